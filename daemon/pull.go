package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/image"
)

// PullOptions are what `varve pull` asks for.
type PullOptions struct {
	ImageOptions
	Full         bool  `json:"full,omitempty"`          // every byte, and not only what a mount needs
	AllPlatforms bool  `json:"all_platforms,omitempty"` // of a manifest list; Platform does not count
	Rate         int64 `json:"rate,omitempty"`          // bytes a second, 0 for no limit
	Containerd   bool  `json:"containerd,omitempty"`    // it is here for containerd's containers
}

// Pulled is what came of a pull.
type Pulled struct {
	Ref    string `json:"Ref"`    // canonical
	Digest string `json:"Digest"` // of what it points at: the image ID

	// Of an image for containerd: the digest of the platform's manifest; by digest that
	// manifest, its config, and the lists that lead to it; why it cannot be lazy.
	Manifest  string            `json:"Manifest,omitempty"`
	Documents map[string][]byte `json:"Documents,omitempty"`
	NotLazy   string            `json:"NotLazy,omitempty"`
}

// Pull brings an image here: its documents and the indexes of its layers, so that
// it can be mounted without asking for them, or all of it.
func (c *Client) Pull(ctx context.Context, o PullOptions) (*Pulled, error) {
	e, err := c.follow(ctx, "/v1/pull", o)
	return e.Pulled, err
}

// Pull brings an image here. What is here already is not fetched again, so a pull
// that broke goes on when it is called again.
func (d *Daemon) Pull(ctx context.Context, o PullOptions, n note) (*Pulled, error) {
	name, err := image.ParseName(o.Image)
	if err == nil {
		err = checkRate(o.Rate)
	}
	if err == nil && o.Containerd {
		err = o.forContainerd(name)
	}
	if err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	o.Pull = "always"
	o.alone = true // to have it open is no reason to fetch more for others
	p := &pulling{Daemon: d, PullOptions: o, note: n, name: name}
	if tag := name.Tag(); tag != "" && !name.IsLocal() && !strings.HasSuffix(o.Image, ":"+tag) {
		n.say("Using default tag: %s", tag)
	}
	before := d.pointsAt(name)
	if err := p.pull(ctx); err != nil {
		return nil, err
	}
	out := &p.out
	out.Ref, out.Digest = name.String(), p.target
	n.say("Digest: %s", out.Digest)
	switch {
	case o.Containerd: // whether it is new there, who asked will know
	case !p.asked:
		n.say("Status: Image is here for %s, its registry gives no answer", name.Familiar())
	case before == p.target:
		n.say("Status: Image is up to date for %s", name.Familiar())
	default:
		n.say("Status: Downloaded newer image for %s", name.Familiar())
	}
	d.log.Info("pulled", "ref", name.Familiar(), "image", out.Digest, "full", o.Full)
	return out, nil
}

// say tells of something that is no layer's state.
func (n note) say(format string, args ...any) {
	n(event{Status: &Status{Status: fmt.Sprintf(format, args...)}})
}

// pointsAt gives the image ID that a name has here, "" if none.
func (d *Daemon) pointsAt(name image.Name) string {
	all, err := d.images.List()
	if err != nil {
		return "" // who asks will be told
	}
	for _, r := range all {
		if r.Name == name {
			return r.Target.String()
		}
	}
	return ""
}

// pulling is a pull on its way.
type pulling struct {
	*Daemon
	PullOptions
	note note
	name image.Name

	target string // what the name was found to point at
	asked  bool   // the registry, and it answered
	out    Pulled
}

func (p *pulling) pull(ctx context.Context) error {
	o := p.ImageOptions
	if !p.AllPlatforms {
		return p.one(ctx, o)
	}
	platforms, err := p.platforms(ctx)
	if err != nil {
		return err
	}
	for _, o.Platform = range platforms {
		if err := p.one(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

// platforms gives those of a manifest list, "" alone where there is none.
func (p *pulling) platforms(ctx context.Context) ([]string, error) {
	o := p.ImageOptions
	r, err := p.resolve(ctx, o, p.note)
	for _, o.Platform = range commonPlatforms {
		if !errors.Is(err, image.ErrNoPlatform) {
			break
		}
		r, err = p.resolve(ctx, o, p.note)
	}
	if err != nil {
		return nil, err
	}
	defer r.close()
	m := r.manifest
	list := m.Blobs[m.Target]
	if m.Target == m.Digest || list == nil {
		return []string{""}, nil
	}
	entries, err := commit.Manifests(list)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", p.name.Familiar(), err)
	}
	var all []string
	for _, e := range entries {
		if !commit.MayBeImage(e) {
			continue
		}
		platform, err := platformOf(e)
		if err != nil {
			return nil, fmt.Errorf("pull %s: %w", p.name.Familiar(), err)
		}
		if !slices.Contains(all, platform) {
			all = append(all, platform)
		}
	}
	return all, nil
}

func platformOf(e ocispec.Descriptor) (string, error) {
	return image.NormalizePlatform(strings.TrimSuffix(e.Platform.OS+"/"+e.Platform.Architecture+"/"+e.Platform.Variant, "/"))
}

// one pulls the image of one platform.
func (p *pulling) one(ctx context.Context, o ImageOptions) error {
	r, err := p.resolve(ctx, o, p.note)
	if err != nil {
		return err
	}
	t := &tree{manifest: r.manifest, resolved: r}
	defer t.close()
	target := r.manifest.Target.String()
	if p.target != "" && p.target != target {
		return fmt.Errorf("pull %s: it was changed in its registry meanwhile: pull it again", p.name.Familiar())
	}
	p.asked = r.known == nil || p.name.IsLocal()
	if p.Containerd {
		if err := p.pin(t); err != nil {
			return fmt.Errorf("pull %s: %w", p.name.Familiar(), err)
		}
	} else if m, config, err := p.images.Get(p.name, o.Platform); err == nil && m.Target == r.manifest.Target && m.Digest == r.manifest.Digest {
		r.known = config // so that it need not be asked for
	}
	if p.target == "" {
		p.target = target
		p.head()
	}
	if p.AllPlatforms && o.Platform != "" {
		p.note.say("Platform %s", o.Platform)
	}
	x := &opening{tree: t, note: p.note, rate: p.Rate, full: p.Full, say: true}
	var next *start
	if p.Containerd {
		next = p.soon(p.life, r)
		r.ready = next.opened
	}
	if err = x.open(ctx); err == nil && p.Full {
		err = x.fill(ctx)
	}
	if err == nil && !p.Containerd {
		err = p.chains.taken(p.name, r.manifest.Digest)
	}
	if p.Containerd {
		if err == nil {
			t.retain()
			_, err = p.chains.keep(t, next)
		} else {
			next.cancel()
		}
		err = p.settle(t, err)
	}
	if err != nil {
		return fmt.Errorf("pull %s: %w", p.name.Familiar(), err)
	}
	if !p.Full && p.out.NotLazy == "" {
		x.loud()
	}
	return nil
}

// head is docker's line before the layers'.
func (p *pulling) head() {
	switch id := p.name.Digest().String(); {
	case p.name.IsLocal():
		p.note.say("Pulling from %s", p.name.Familiar())
	case id != "":
		p.note.report(id, "Pulling from "+p.name.Repository(), 0, 0)
	default:
		p.note.report(p.name.Tag(), "Pulling from "+p.name.Repository(), 0, 0)
	}
}

// opening opens the layers of an image for who is going to bring their bytes. Its
// tree is whole when that is done.
type opening struct {
	tree *tree
	note note
	rate int64 // bytes a second, 0 for no limit
	full bool  // all of it is wanted
	say  bool  // the state of every layer, not only that of those which are read whole

	here []bool // by layer: the store had it
	read []bool // by layer: it was read whole just now
}

// open opens the layers, those that the store has not side by side, keeps the
// image's documents, and builds the index. Layers without an index are read whole,
// no faster than the limit allows.
func (x *opening) open(ctx context.Context) error {
	t := x.tree
	x.here, x.read = make([]bool, len(t.manifest.Layers)), make([]bool, len(t.manifest.Layers))
	t.layers = make([]*fetch.Handle, len(t.manifest.Layers))
	if err := x.look(ctx); err != nil {
		return err
	}
	eg, ectx := errgroup.WithContext(ctx)
	for i := range t.layers {
		eg.Go(func() error { return x.layer(ectx, i) })
	}
	eg.Go(func() error { _, err := t.diffIDs(); return err })
	if err := eg.Wait(); err != nil {
		return err
	}
	if ready := t.resolved.ready; ready != nil {
		ready(t)
	}
	if err := t.keep(); err != nil {
		return err
	}
	var err error
	t.index, err = t.d.sharedIndex(t.layers)
	return err
}

// look finds out what the store has, and says so in the layers' own order.
func (x *opening) look(ctx context.Context) error {
	t := x.tree
	for i, l := range t.manifest.Layers {
		q, err := t.request(ctx, i, x.note)
		if err != nil {
			return err
		}
		q.Blob = nil
		h, err := t.d.fetcher.Open(ctx, q)
		if err != nil && !errors.Is(err, fetch.ErrOffline) {
			return err
		}
		status := "Pulling fs layer"
		if err == nil {
			x.here[i] = true
			if !x.full || h.Whole() {
				status = "Already exists"
			}
			h.Close()
		}
		if x.say {
			x.note.report(short(l), status, 0, 0)
		}
	}
	return nil
}

// layer opens one.
func (x *opening) layer(ctx context.Context, i int) error {
	t := x.tree
	l := t.manifest.Layers[i]
	q, err := t.request(ctx, i, x.note)
	if err != nil {
		return err
	}
	first := q
	if x.rate > 0 {
		if first.Blob, err = t.blobs.limited(l, newLimit(x.rate)); err != nil {
			return err
		}
	}
	h, pass, err := t.d.fetcher.Start(ctx, first)
	if err != nil {
		return err
	}
	if pass != nil {
		err := x.pass(ctx, l, pass)
		pass.Close()
		if err != nil {
			return err
		}
		x.read[i] = true
	}
	if h != nil && x.rate > 0 {
		h.Close() // what is read through it by others is not to be slow
		h = nil
	}
	if h == nil {
		if h, err = t.d.fetcher.Open(ctx, q); err != nil {
			return err
		}
	}
	t.layers[i] = h
	if !x.say || x.here[i] {
		return nil
	}
	switch {
	case h.Whole():
		x.note.report(short(l), "Pull complete", 0, 0)
	case !x.full:
		x.note.report(short(l), "Indexed", 0, 0)
	}
	return nil
}

// pass tells how far a layer is that is read whole, until it is.
func (x *opening) pass(ctx context.Context, l image.Layer, p *fetch.Pass) error {
	every := time.NewTicker(beat)
	defer every.Stop()
	for {
		select {
		case <-every.C:
			n, size := p.Read()
			x.note.report(short(l), "Downloading", n, size)
			continue
		case <-p.Done():
		case <-ctx.Done():
		}
		return p.Wait(ctx)
	}
}

// atOnce is how many layers are filled side by side: docker's number.
const atOnce = 3

// fill brings every byte of every layer.
func (x *opening) fill(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(atOnce)
	if x.rate > 0 {
		eg.SetLimit(1) // the limit is for all of them
	}
	begun := map[string]bool{}
	for i, h := range x.tree.layers {
		if h.Whole() || begun[h.Key] {
			continue
		}
		begun[h.Key] = true
		l := x.tree.manifest.Layers[i]
		eg.Go(func() error {
			m := &bar{note: x.note, id: short(l), status: "Downloading"}
			err := x.tree.d.fetcher.Bring(ctx, []fetch.Want{{Layer: h, N: h.Size()}}, fetch.Bringing{Class: fetch.Profile, Rate: x.rate, Progress: m.at})
			if err != nil {
				return err
			}
			if h.About().Unproven {
				x.note.report(short(l), "Verifying Checksum", 0, 0)
			}
			if err := h.Settle(ctx); err != nil {
				return fmt.Errorf("%w: pull it again, which does without that index", err)
			}
			x.note.report(short(l), "Pull complete", 0, 0)
			return nil
		})
	}
	return eg.Wait()
}

// loud says which layers are not lazy, and why.
func (x *opening) loud() {
	m := x.tree.manifest
	var ids []string
	var bytes int64
	why := ""
	for i, read := range x.read {
		if read {
			ids = append(ids, short(m.Layers[i]))
			bytes += m.Layers[i].Size
			why = x.tree.layers[i].About().Why
		}
	}
	if len(ids) == 0 {
		return
	}
	hint := ""
	if n := x.tree.name; !n.IsLocal() && !n.IsID() {
		hint = fmt.Sprintf(" (`varve index --push %s` makes the image lazy for others)", n.Familiar())
	}
	x.note.warn("%d of %d layers were not lazy, %s were read: %s: %s%s", len(ids), len(m.Layers), units.HumanSize(float64(bytes)), strings.Join(ids, ", "), why, hint)
}

// short is how a layer is called in what is shown.
func short(l image.Layer) string {
	id := l.Digest.Encoded()
	return id[:min(12, len(id))]
}

// bar tells how far something is, from any goroutine.
type bar struct {
	note       note
	id, status string

	mu          sync.Mutex // guards what follows
	told        time.Time
	done, total int64
}

// at is told of bytes, as [fetch.Bringing] does.
func (b *bar) at(done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if done < b.done { // said later than it was so
		return
	}
	b.done, b.total = done, total
	if now := time.Now(); now.Sub(b.told) > beat || done == total {
		b.told = now
		b.note.report(b.id, b.status, done, total)
	}
}
