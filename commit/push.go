package commit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/image"
)

// Blobs gives an image's blobs from wherever they are: the local store, an
// archive, or the registry they come from, resuming there by itself.
type Blobs interface {
	// Open reads a blob from an offset to its end. The bytes are not verified.
	// The reader's Read returns when ctx ends. Who opens it closes it.
	Open(ctx context.Context, l image.Layer, off int64) (io.ReadCloser, error)
	// Local reports whether the bytes are here, so that no network is needed.
	Local(d digest.Digest) bool
}

// Sessions keeps the places of unfinished uploads between pushes. It is used by
// several goroutines at once; to lose what it holds costs only bytes.
type Sessions interface {
	Load(key string) (Session, bool)
	Store(key string, s Session)
	Drop(key string)
}

// Session is an unfinished upload of one blob. Its URL may be signed: it belongs
// into files that only their owner reads, and into no log.
type Session struct {
	Location string `json:"location"`        // absolute URL
	Marks    []Mark `json:"marks,omitempty"` // in the order of their offsets
}

// Mark is the state of the blob's SHA-256 after Offset bytes, so that the bytes
// before it need not be read again to prove the whole.
type Mark struct {
	Offset int64  `json:"offset"`
	State  []byte `json:"state"`
}

// Report is told of progress. id is the first 12 digits of the layer's digest,
// status what docker prints ("Preparing", "Waiting", "Pushing", "Pushed", "Layer
// already exists", "Mounted from library/x", "Skipped foreign layer"), current
// and total are bytes. Calls come from several goroutines, one at a time.
type Report func(id, status string, current, total int64)

// PushOptions say where an image goes. Target and Transport must be set.
type PushOptions struct {
	// Target is the name to push to, with a tag or with the manifest's digest.
	Target image.Name
	// Base is scheme and host of the registry; nil: HTTPS at the name's registry.
	Base *url.URL
	// Transport authenticates with pull and push on the target's repository and
	// pull on those of MountFrom, see [image.Registries.Transport].
	Transport http.RoundTripper
	// MountFrom names repositories of the same registry that may have layers.
	MountFrom []string
	// Blobs has the layers' bytes. It is asked only for what the registry lacks.
	Blobs Blobs
	// Sessions lets a later push go on where this one broke; nil: none does.
	Sessions Sessions
	// Report may be nil.
	Report Report
	// Parallel is how many blobs are on their way at once, 0 for 3.
	Parallel int
	// Chunk bounds the bytes of one request, for registries behind a proxy with
	// such a limit; 0: the rest of a blob in one, until the registry refuses it.
	Chunk int64

	wait  func(context.Context, time.Duration) error // between attempts; nil: sleep
	stall time.Duration                              // without progress; 0: stallTime
}

// Count is a number of blobs and the sum of their sizes in bytes.
type Count struct {
	Blobs int
	Bytes int64
}

func (c *Count) add(size int64) {
	c.Blobs++
	c.Bytes += size
}

// Pushed says what a push did. Every blob of the image, the config among them,
// is counted once, in the first four or as Skipped.
type Pushed struct {
	Digest digest.Digest // of the manifest
	Size   int64         // of the manifest, in bytes

	Uploaded Count // uploaded from here
	Mounted  Count // mounted from another repository of the registry
	Existed  Count // found there
	Streamed Count // uploaded from another registry, through here
	Skipped  Count // foreign layers, which stay where they are

	Sent     int64 // bytes of blobs that went to the registry, repeats included
	Received int64 // bytes of blobs that came from another registry
	Resumed  int64 // bytes that an earlier push had left there
}

// Line is the last line that docker push prints: "latest: digest: sha256:… size: 1234".
func (p *Pushed) Line(target image.Name) string {
	tag := target.Tag()
	if tag == "" {
		tag = p.Digest.String()
	}
	return fmt.Sprintf("%s: digest: %s size: %d", tag, p.Digest, p.Size)
}

// defaultParallel is fewer than docker's five: more streams share the same line.
const defaultParallel = 3

// Push brings an image into a registry: the blobs that it lacks, mounted from
// its other repositories where they are there, else uploaded, and at last the
// manifest m.Raw, as it is. Of an image that came in a manifest list only this
// platform's manifest is pushed. Blobs are hashed on the way: no upload of other
// bytes is finished.
//
// Errors name the target and wrap one of image's kinds: ErrUnauthorized,
// ErrUnreachable after the attempts are spent, ErrMalformed for a registry that
// breaks the protocol and for blobs that are not what their digests say. What was
// uploaded before stays there, also the part of a blob, see [Sessions].
func Push(ctx context.Context, m *image.Manifest, config []byte, o PushOptions) (*Pushed, error) {
	if err := checkPush(m, config, o); err != nil {
		return nil, err
	}
	if o.Parallel <= 0 {
		o.Parallel = defaultParallel
	}
	c := newClient(o)
	p := &pusher{client: c, o: o, done: &Pushed{Digest: m.Digest, Size: int64(len(m.Raw))}}
	uploads := p.plan(m, config)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Parallel)
	for _, u := range uploads {
		g.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			return u.run(gctx)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, p.fail(ctx, err)
	}
	if err := c.putManifest(ctx, m, o.Target); err != nil {
		return nil, p.fail(ctx, err)
	}
	return p.done, nil
}

// checkPush finds what no registry should be bothered with.
func checkPush(m *image.Manifest, config []byte, o PushOptions) error {
	t := o.Target
	bad := func(format string, args ...any) error {
		return pushErrorf(image.ErrMalformed, nil, "push %s: "+format, append([]any{t.Familiar()}, args...)...)
	}
	switch {
	case t.Registry() == "" || t.Repository() == "":
		return bad("it names no repository of a registry")
	case o.Transport == nil:
		return bad("no transport given")
	case o.Blobs == nil && len(m.Layers) > 0:
		return bad("no blobs given")
	case digest.FromBytes(m.Raw) != m.Digest:
		return bad("the manifest is not %s, it is damaged", m.Digest)
	case t.Digest() != "" && t.Digest() != m.Digest:
		return bad("the image is %s, push it by a tag", m.Digest)
	case digest.FromBytes(config) != m.ConfigDesc.Digest || int64(len(config)) != m.ConfigDesc.Size:
		return bad("the config is not %s, it is damaged", m.ConfigDesc.Digest)
	}
	return nil
}

// pusher is what the uploads of one push share.
type pusher struct {
	client *client
	o      PushOptions

	mu   sync.Mutex // guards done, and lets Report be called by one at a time
	done *Pushed
}

// plan makes one upload for each blob, the config last.
func (p *pusher) plan(m *image.Manifest, config []byte) []*upload {
	var uploads []*upload
	seen := map[digest.Digest]bool{}
	for _, l := range m.Layers {
		switch {
		case seen[l.Digest]:
			continue
		case l.Foreign():
			p.done.Skipped.add(l.Size)
			p.report(l.Digest, "Skipped foreign layer", 0, l.Size)
		default:
			p.report(l.Digest, "Preparing", 0, l.Size)
			u := p.upload(l)
			u.from = p.o.MountFrom
			u.local = p.o.Blobs.Local(l.Digest)
			u.open = func(ctx context.Context, off int64) (io.ReadCloser, error) { return p.o.Blobs.Open(ctx, l, off) }
			uploads = append(uploads, u)
		}
		seen[l.Digest] = true
	}
	for i, u := range uploads {
		if i >= p.o.Parallel {
			p.report(u.digest, "Waiting", 0, u.size)
		}
	}
	if !seen[m.ConfigDesc.Digest] {
		// Its bytes are at hand and few: to ask other repositories costs more.
		u := p.upload(image.Layer{Digest: m.ConfigDesc.Digest, Size: m.ConfigDesc.Size})
		u.what, u.quiet, u.local = "config", true, true
		u.open = func(_ context.Context, off int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(config[min(off, int64(len(config))):])), nil
		}
		uploads = append(uploads, u)
	}
	return uploads
}

func (p *pusher) upload(l image.Layer) *upload {
	return &upload{
		pusher: p, client: p.client, what: "layer", digest: l.Digest, size: l.Size, chunk: p.o.Chunk,
		key:   p.o.Target.Registry() + "/" + p.o.Target.Repository() + "@" + l.Digest.String(),
		tally: newTally(), budget: newBudget(),
	}
}

func (p *pusher) report(d digest.Digest, status string, current, total int64) {
	if p.o.Report == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.o.Report(shortID(d), status, current, total)
}

// count changes what the push did.
func (p *pusher) count(change func(*Pushed)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p.done)
}

// fail gives an error the push's name. What the caller cancelled stays that.
func (p *pusher) fail(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return fmt.Errorf("push %s: %w", p.o.Target.Familiar(), cause)
	}
	return pushErrorf(kindOf(err), err, "push %s: %s", p.o.Target.Familiar(), err)
}

// shortID is how docker shows a layer.
func shortID(d digest.Digest) string {
	s := d.Encoded()
	return s[:min(12, len(s))]
}
