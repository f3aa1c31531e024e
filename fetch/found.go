package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/docker/go-units"

	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
)

// maxSpan is the largest span of an index that others made, compressed.
const maxSpan = 64 << 20

// ErrNoIndex says that a layer has no index where one is required.
var ErrNoIndex = errors.New("the layer has no index")

// The kinds of indexes that others make.
const (
	KindBundle = "varve" // index.Bundle
	KindSOCI   = "soci"  // a zTOC
)

// Found is an index of a layer that somebody made and put beside its image.
type Found struct {
	Kind   string
	Digest string // of the document, which proves it
	Why    string // where it was found, in a few words
	// Bytes gives the document, verified.
	Bytes func(ctx context.Context) ([]byte, error)
}

func (x *Found) key(layer string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s", x.Kind, x.Digest))
	return fmt.Sprintf("%s+%x", layer, sum[:16])
}

// refusal is why none of a layer's indexes is used.
type refusal struct{ reason, why string }

// found opens a layer by the first index that others made of it and that can be
// used. Where there is none, refusal says what kept it from those there are.
func (f *Fetcher) found(ctx context.Context, q Request) (*Handle, *refusal, error) {
	var no *refusal
	if strings.HasPrefix(q.Key, q.Digest+"+") && !f.store.Refused(q.Key) {
		if h, err := f.acquire(q.Key, q); !errors.Is(err, store.ErrNotFound) {
			return h, nil, err
		}
	}
	if q.Find == nil {
		return nil, nil, nil
	}
	all, err := q.Find(ctx)
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	if err != nil {
		no = &refusal{"index_unreachable", "its indexes could not be asked for (" + err.Error() + ")"}
	}
	for i := range all {
		x := &all[i]
		key := x.key(q.Digest)
		if f.store.Refused(key) {
			no = &refusal{"index_refused", fmt.Sprintf("its %s index %.19s was found wrong before", x.Kind, x.Digest)}
			continue
		}
		h, err := f.acquire(key, q)
		unseen := errors.Is(err, store.ErrNotFound)
		if unseen {
			if q.Blob == nil {
				continue
			}
			h, err = f.prepared(ctx, key, q, x)
		}
		switch {
		case err == nil:
			return h, nil, nil
		case ctx.Err() != nil:
			return nil, nil, ctx.Err()
		case unseen && (errors.Is(err, index.ErrMalformed) || errors.Is(err, ErrVerify)):
			f.m.VerifyFailures.WithLabelValues("index").Inc()
			if err := f.store.Refuse(key); err != nil {
				return nil, nil, err
			}
			no = &refusal{"index_malformed", fmt.Sprintf("its %s index %.19s cannot be used (%v)", x.Kind, x.Digest, err)}
		default:
			no = &refusal{"index_unreachable", fmt.Sprintf("its %s index %.19s is not to be had (%v)", x.Kind, x.Digest, err)}
		}
		f.log.Warn("index not used", "layer", q.Digest, "index", x.Digest, "kind", x.Kind, "err", err)
	}
	return nil, no, nil
}

// byIndex keeps a layer as an index says it is, to be proven when all of it is
// here.
func (p *preparation) byIndex(x *Found) error {
	raw, err := x.Bytes(p.ctx)
	if err != nil {
		return err
	}
	about := About{Size: p.Size, Index: x.Kind, Unproven: true, Why: fmt.Sprintf("its index %.19s (%s) was found %s", x.Digest, units.HumanSize(float64(len(raw))), x.Why)}
	var l *index.Layer
	switch x.Kind {
	case KindBundle:
		l, err = p.bundle(raw, &about)
	case KindSOCI:
		l, err = p.ztoc(raw, &about)
	default:
		err = fmt.Errorf("%w: an index of kind %q", index.ErrMalformed, x.Kind)
	}
	if err != nil {
		return err
	}
	g, err := p.store.Stage(p.key)
	if err != nil {
		return err
	}
	defer g.Discard()
	return p.keep(g, l, about, p.fetched+int64(len(raw)), false)
}

func (p *preparation) bundle(raw []byte, about *About) (*index.Layer, error) {
	b, err := index.ReadBundle(raw)
	if err != nil {
		return nil, err
	}
	if b.Digest != p.Digest || b.Size != p.Size {
		return nil, fmt.Errorf("%w: it is that of a layer %.19s of %d bytes", index.ErrMalformed, b.Digest, b.Size)
	}
	if err := p.checkDiffID(b.DiffID); err != nil {
		return nil, err
	}
	_, _, about.Contents = b.Frames.Len()
	about.Format, about.Uncompressed = b.Format, b.Uncompressed
	l := b.Layer
	l.Frames, err = index.WithRest(b.Frames, b.Points, b.Uncompressed)
	return &l, err
}

func (p *preparation) ztoc(raw []byte, about *About) (*index.Layer, error) {
	z, err := soci.Read(raw, p.Size)
	if err != nil {
		return nil, err
	}
	n, _, _ := z.Frames.Len()
	for i := range n {
		if f := z.Frames.Frame(i); f.Length > maxSpan {
			return nil, fmt.Errorf("%w: a span of %d bytes, the limit is %d", index.ErrMalformed, f.Length, maxSpan)
		}
	}
	about.ByFrame, about.Contents, about.Uncompressed = true, z.Contents, z.Uncompressed
	about.Format = "tar"
	if n > 0 && z.Frames.Frame(0).Kind == index.Deflate {
		about.Format = "tar+gzip"
	}
	return &z.Layer, nil
}
