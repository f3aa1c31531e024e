package daemon

import (
	"slices"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fetch/profile"
)

// A start is over when nothing was read for the first time for a while, and in any
// case after so long: a workload that reads on is no longer starting.
const (
	quietTime = 10 * time.Second
	startTime = 5 * time.Minute
)

// canRecord reports whether the mount's start is to be recorded and can be: what
// the kernel reads from plain files nobody sees.
func (s *start) canRecord() bool {
	if s.again || s.quiet != nil && *s.quiet == 0 {
		return false
	}
	return s.kind != faceKernel || slices.ContainsFunc(s.layers, func(h *fetch.Handle) bool {
		return !h.Whole() || h.About().Unproven
	})
}

// growing is told the tree of a mount of which layers are still read. All of it
// comes in any case; what the start reads is of use to the next, if that finds
// indexes.
func (s *start) growing(t *tree) {
	s.use.Source, s.use.State = fromNothing, "done"
	if s.again || s.quiet != nil && *s.quiet == 0 {
		return
	}
	s.recorder = s.d.fetcher.Record(t.layers, true)
	for i, p := range t.passes {
		if p != nil {
			s.recorder.Follow(i, p)
		}
	}
}

// grown is told the tree when all of them have been.
func (s *start) grown(t *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers, s.sizes = t.layers, profileLayers(t)
}

// watch ends the recording when the start is over. The time counts from the first
// read: what runs in the mount may come long after it.
func (s *start) watch(r *fetch.Recorder) {
	began, first := time.Now(), time.Time{}
	for {
		now, last := time.Now(), r.Last()
		if first.IsZero() {
			first = last
		}
		wait := time.Second
		switch {
		case s.quiet != nil:
			wait = began.Add(*s.quiet).Sub(now)
		case !last.IsZero():
			wait = min(last.Add(quietTime).Sub(now), first.Add(startTime).Sub(now))
		}
		if wait <= 0 {
			if _, known := s.known(); known {
				s.keep()
				return
			}
			wait = time.Second
		}
		select {
		case <-s.ctx.Done(): // who ended it keeps what there is
			return
		case <-time.After(wait):
		}
	}
}

// keep ends the recording and keeps the profile that came of it, once.
func (s *start) keep() {
	s.kept.Do(func() {
		s.mu.Lock()
		r := s.recorder
		s.recorder, s.keeping = nil, r != nil
		s.mu.Unlock()
		if r == nil {
			return
		}
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.keeping = false
		}()
		s.expected(false)
		uses := r.Stop()
		sizes, known := s.known()
		if len(uses) == 0 || !known {
			return
		}
		if err := s.merge(uses, sizes); err != nil {
			s.log.Warn("what a start read is not kept", "err", err)
		}
	})
}

// known gives the layers as profiles name them. It is not known while some are still
// read.
func (s *start) known() ([]profile.Layer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sizes, s.sizes != nil
}

// merge adds what was recorded to what is known of starts. Mounts of one image may
// end at once: each adds to what is kept by then.
func (s *start) merge(uses []profile.Use, sizes []profile.Layer) error {
	first := uses[0].After
	for i := range uses {
		uses[i].After -= first
	}
	m := s.image.manifest.Digest
	s.d.profileMu.Lock()
	defer s.d.profileMu.Unlock()
	used, fetched := s.fetched()
	old, err := s.d.localProfile(m, s.name)
	if err != nil || old == nil || old.Check(m.String(), sizes) != nil {
		old = used
	} else if used == nil || !used.Created.Equal(old.Created) || !slices.Equal(used.Uses, old.Uses) {
		fetched = nil // of another one
	}
	return s.d.keepProfile(&profile.Profile{
		Manifest: m.String(), Name: s.name, Created: time.Now(), Layers: sizes,
		Uses: profile.Merge(old, sizes, uses, fetched),
	})
}

// fetched gives the profile that was used, nil if there was none, and which of its
// ranges this start had fetched. A daemon that ends in the middle of a start has
// not seen which of them nobody needs.
func (s *start) fetched() (*profile.Profile, []bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used == nil || s.d.life.Err() != nil {
		return s.used, nil
	}
	fetched := make([]bool, len(s.missing))
	for i, u := range s.used.Uses {
		fetched[i] = s.missing[i] && s.layers[u.Layer].Has(u.Off, u.N)
	}
	return s.used, fetched
}

// reading reports whether reads are being recorded, which the kernel must not take
// over meanwhile: what nobody sees would be missing from the profile.
func (s *start) reading() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.recorder != nil && !s.recorder.Last().IsZero()
}
