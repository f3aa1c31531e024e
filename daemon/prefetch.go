package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/fs"
)

// What a mount has fetched ahead of need.
const (
	prefetchNone    = "none"    // nothing, not even neighbours of what is read
	prefetchProfile = "profile" // what its start will need
	prefetchAll     = "all"     // that, and then everything, in the background
)

// Where it is known from what a start will need.
const (
	fromLocal    = "local"
	fromPushed   = "referrer"
	fromLandmark = "landmark"
	fromSOCI     = "soci"
	fromProgram  = "program"
	fromNothing  = "none"
)

// ProfileUse is what a mount fetches ahead of need.
type ProfileUse struct {
	Name   string `json:"Name"`            // of the workload
	Source string `json:"Source"`          // local, referrer, landmark, soci, none; "" while it is being looked for
	Bytes  int64  `json:"Bytes"`           // of files that it names
	State  string `json:"State"`           // looking, fetching, done, failed
	Error  string `json:"Error,omitempty"` // why it failed
	// Compressed bytes that were missing, and how many of them are here by now.
	Missing int64 `json:"Missing"`
	Fetched int64 `json:"Fetched"`
}

// check says what is wrong with how the start of a mount is asked for.
func (o *MountOptions) checkStart() (err error) {
	if o.Profile, err = profile.ParseName(o.Profile); err == nil && !slices.Contains([]string{"", prefetchNone, prefetchProfile, prefetchAll}, o.Prefetch) {
		err = fmt.Errorf("prefetch %q: want none, profile or all", o.Prefetch)
	}
	if err == nil && o.RecordFor != nil && *o.RecordFor < 0 {
		err = fmt.Errorf("record for %v: want no less than 0", *o.RecordFor)
	}
	if err != nil {
		return fmt.Errorf("%w%w", err, silent{errUsage})
	}
	return nil
}

// start is what is done about the start of a mount: what it will need is fetched
// ahead, and what it reads is recorded.
type start struct {
	d     *Daemon
	log   *slog.Logger
	note  note // of who mounts; only until the tree is open
	mode  string
	name  string
	again bool // the daemon was started anew, and not what runs in the mount
	kind  string
	quiet *time.Duration // how long to record; nil: until it goes quiet

	ctx    context.Context
	cancel context.CancelFunc

	// runs is told the tree with its index, where a container starts in it: if nothing
	// better is known, what any program needs is fetched.
	runs chan *tree

	image  *resolved
	ask    func() (*profile.Profile, error) // for a pushed profile, once
	local  *profile.Profile
	layers []*fetch.Handle
	sizes  []profile.Layer

	kept sync.Once // what was recorded

	mu       sync.Mutex // guards what follows
	use      ProfileUse
	used     *profile.Profile
	missing  []bool // of the ranges of used, when they were asked for
	recorder *fetch.Recorder
	keeping  bool // what it recorded is not kept yet
}

// starting prepares the start of a mount that is on its way up, with this face.
func (m *mount) starting(kind string, n note) *start {
	s := &start{
		d: m.d, log: m.d.log.With("mount", m.Name, "image", m.Image), note: n, mode: m.Prefetch, name: m.Profile, again: m.restoring, kind: kind, quiet: m.RecordFor,
	}
	if s.mode == "" {
		s.mode = prefetchProfile
	}
	s.use = ProfileUse{Name: profile.Title(s.name), State: "looking"}
	s.ctx, s.cancel = context.WithCancel(m.d.life)
	return s
}

// soon prepares the start of an image of which a container comes next: what that will
// need is fetched before there is a mount, which records.
func (d *Daemon) soon(ctx context.Context, r *resolved) *start {
	s := &start{
		d: d, log: d.log.With("image", r.name.Familiar()), note: func(event) {}, mode: prefetchProfile,
		kind: faceKernel, quiet: new(time.Duration), runs: make(chan *tree, 1),
	}
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.resolved(r)
	return s
}

// resolved is told the manifest, as soon as it is known. A profile that was pushed
// is asked for beside what the mount asks for, where this machine sees the image for
// the first time; else only if it turns out to be of use.
func (s *start) resolved(r *resolved) {
	if s.image != nil {
		return
	}
	s.image = r
	s.ask = sync.OnceValues(func() (*profile.Profile, error) {
		if s.again || r.o.Offline || r.name.IsLocal() {
			return nil, nil
		}
		return s.d.pushedOnce(s.ctx, r, s.name)
	})
	if r.depth() < len(r.manifest.Layers) { // a part of an image is no start of it
		s.mode, s.quiet = prefetchNone, new(time.Duration)
		return
	}
	var err error
	if s.local, err = s.d.localProfile(r.manifest.Digest, s.name); err != nil {
		s.ignore(err)
	}
	if s.mode != prefetchNone && s.local == nil && r.known == nil {
		s.d.background.Go(func() { s.ask() })
	}
}

func (s *start) ignore(err error) {
	s.note.warn("%v; going on without", err)
	s.log.Warn("start-up profile not used", "err", err)
}

// opened is told the tree when all its layers can be read, before it is mounted.
func (s *start) opened(t *tree) {
	s.layers, s.sizes = t.layers, profileLayers(t)
	if s.local != nil {
		if err := s.local.Check(t.manifest.Digest.String(), s.sizes); err != nil {
			s.ignore(fmt.Errorf("the start-up profile %s: %w", s.d.profilePath(t.manifest.Digest, s.name), err))
			s.local = nil
		}
	}
	if s.canRecord() {
		s.recorder = s.d.fetcher.Record(t.layers, !s.here())
	}
	if s.mode == prefetchNone || s.image.o.Offline {
		s.use.Source, s.use.State = fromNothing, "done"
		return
	}
	t.retain()
	s.d.background.Go(func() {
		defer t.close()
		s.fetch(t)
	})
}

// here reports whether it is known what the start will need, and all of that is here.
func (s *start) here() bool {
	return s.local != nil && !slices.ContainsFunc(s.local.Uses, func(u profile.Use) bool {
		return !s.layers[u.Layer].Has(u.Off, u.N)
	})
}

// mounted is told when the mount can be read.
func (s *start) mounted() {
	s.mu.Lock()
	r := s.recorder
	s.mu.Unlock()
	if r != nil {
		s.d.background.Go(func() { s.watch(r) })
	}
}

// fetch brings what the start will need, and then the rest if it was asked for.
func (s *start) fetch(t *tree) {
	source, wants, err := s.wants(t)
	if source == fromNothing && s.runs != nil {
		source = fromProgram
	}
	s.mu.Lock()
	s.use.Source, s.use.State = source, "fetching"
	for _, w := range wants {
		s.use.Bytes += w.N
	}
	s.mu.Unlock()
	if err != nil && s.ctx.Err() == nil {
		s.log.Warn("what a start needs is not all known", "source", source, "err", err)
	}
	var disk sync.WaitGroup
	defer disk.Wait()
	disk.Go(func() { s.readDisk(wants) })
	began := time.Now()
	if len(wants) > 0 {
		// A few bytes that nobody reads cost less than another request.
		if err = s.d.fetcher.Bring(s.ctx, wants, fetch.Bringing{Class: fetch.Profile, Waste: 4, Progress: s.progress}); err != nil && s.ctx.Err() == nil {
			s.log.Warn("what a start needs could not all be fetched ahead", "source", source, "err", err)
		}
	}
	if source == fromProgram {
		if err = s.program(); err == nil {
			s.log.Info("fetched ahead", "source", source, "dur", time.Since(began))
		}
	}
	if s.fetchedAhead(err); s.ctx.Err() != nil {
		return
	}
	if len(wants) > 0 && err == nil {
		s.log.Info("fetched ahead", "source", source, "dur", time.Since(began))
	}
	if s.mode == prefetchAll {
		s.fill(t)
	}
}

// program brings what a container reads before its program does anything.
func (s *start) program() error {
	select {
	case t := <-s.runs:
		c, err := s.d.imageConfig(s.image.manifest)
		if err != nil {
			return err
		}
		return newProgram(t, c).bring(s.ctx, s.d.fetcher)
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// readDisk has the disk read what the start will need and is here, in its order: the
// reads of a program wait for each other.
func (s *start) readDisk(wants []fetch.Want) {
	left := int64(maxReadDisk)
	for _, w := range wants {
		if left -= w.N; left < 0 || s.ctx.Err() != nil {
			return
		}
		if w.Layer.Has(w.Off, w.N) {
			fs.WillNeed(w.Layer.Fd(), w.Off, w.N)
		}
	}
}

// maxReadDisk bounds what that puts into the page cache, in bytes.
const maxReadDisk = 256 << 20

func (s *start) fetchedAhead(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.use.State = "done"
	if err != nil {
		s.use.State, s.use.Error = "failed", err.Error()
	}
	if err != nil || s.recorder == nil && s.runs == nil { // else until it is over, or its container's own has begun
		s.expected(false)
	}
}

func (s *start) progress(done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.use.Fetched, s.use.Missing = max(s.use.Fetched, done), total
}

// wants gives what the start will need, by the best that is known of it: the
// profile that is kept here, the one that was pushed, what the image says itself.
func (s *start) wants(t *tree) (source string, wants []fetch.Want, err error) {
	if s.local != nil {
		return fromLocal, s.wantsOf(s.local), nil
	}
	if !slices.ContainsFunc(t.layers, func(h *fetch.Handle) bool { return !h.Whole() }) {
		return fromNothing, nil, nil
	}
	p, err := s.ask()
	if p != nil {
		if cerr := p.Check(t.manifest.Digest.String(), s.sizes); cerr == nil {
			return fromPushed, s.wantsOf(p), nil
		} else {
			err = cerr
		}
	}
	for _, h := range t.layers {
		if n := h.Landmark(); n > 0 {
			wants = append(wants, fetch.Want{Layer: h, N: n})
		}
	}
	if len(wants) > 0 {
		s.expected(true) // its builder has seen the start, or knows it
		return fromLandmark, wants, err
	}
	for _, h := range t.layers {
		if h.About().Index == fetch.KindSOCI {
			more, serr := s.image.indexes.prefetch(s.ctx, h)
			wants, err = append(wants, more...), errors.Join(err, serr)
		}
	}
	if len(wants) > 0 {
		return fromSOCI, wants, err
	}
	return fromNothing, nil, err
}

// wantsOf gives the ranges of a profile, and notes which of them are missing.
func (s *start) wantsOf(p *profile.Profile) []fetch.Want {
	wants, missing := make([]fetch.Want, len(p.Uses)), make([]bool, len(p.Uses))
	for i, u := range p.Uses {
		wants[i] = fetch.Want{Layer: s.layers[u.Layer], Off: u.Off, N: u.N}
		missing[i] = !s.layers[u.Layer].Has(u.Off, u.N)
	}
	for i, was := range s.d.chains.missed(s.image.manifest.Digest.String(), p) {
		missing[i] = missing[i] || was // what has come meanwhile came for this start
	}
	s.mu.Lock()
	s.used, s.missing = p, missing
	s.mu.Unlock()
	s.expected(true)
	return wants
}

// expected says whether it is known what the start reads: then nothing comes besides.
func (s *start) expected(known bool) {
	for _, h := range s.layers {
		h.Known(known)
	}
}

// fill brings everything else, however often the registry goes away meanwhile.
func (s *start) fill(t *tree) {
	wants := make([]fetch.Want, len(t.layers))
	for i, h := range t.layers {
		wants[i] = fetch.Want{Layer: h, N: h.Size()}
	}
	const least, most = 10 * time.Second, 10 * time.Minute
	for pause := least; ; pause = min(2*pause, most) {
		err := s.d.fetcher.Bring(s.ctx, wants, fetch.Bringing{Class: fetch.Background})
		if err == nil || s.ctx.Err() != nil {
			return
		}
		s.log.Warn("the rest of an image could not be fetched, another attempt follows", "pause", pause, "err", err)
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// view says what is known of the start.
func (s *start) view(v *Mount) {
	s.mu.Lock()
	defer s.mu.Unlock()
	use := s.use
	v.Prefetch, v.Profile, v.Recording = s.mode, &use, s.recorder != nil || s.keeping
}

// end ends the start with its mount, and keeps what was recorded.
func (s *start) end() {
	s.cancel()
	s.keep()
}
