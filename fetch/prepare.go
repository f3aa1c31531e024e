package fetch

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/varvefs/varve/fetch/store"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/estargz"
	"github.com/varvefs/varve/index/tarscan"
	"github.com/varvefs/varve/index/zstdchunked"
)

// prepare brings what the store does not have of a layer that can be read by
// ranges: its table of contents, which its manifest vouches for, or an index that
// others made.
func (f *Fetcher) prepare(ctx context.Context, key string, q Request, by *Found) error {
	_, err := f.resident(key)
	if !errors.Is(err, store.ErrNotFound) {
		return err // another was faster
	}
	if errors.Is(err, store.ErrDamaged) || errors.Is(err, index.ErrMalformed) {
		f.log.Warn("layer in the store is damaged and made again", "layer", q.Digest, "err", err)
	}
	// What is left of it would be in the way.
	if err := f.store.Remove(key); err != nil {
		return err
	}
	p := preparation{Fetcher: f, Request: q, key: key, ctx: ctx}
	if by != nil {
		return p.byIndex(by)
	}
	return p.byTOC()
}

// preparation is a layer on its way into the store.
type preparation struct {
	*Fetcher
	Request
	key     string
	ctx     context.Context // of the one call that prepares
	fetched int64
}

func (p *preparation) byTOC() error {
	g, err := p.store.Stage(p.key)
	if err != nil {
		return err
	}
	defer g.Discard()
	position, chunked, err := zstdchunked.FromAnnotations(p.Annotations)
	if err != nil {
		return err
	}
	toc, _ := estargz.TOCDigest(p.Annotations)
	var l *index.Layer
	about := About{Size: p.Size, Index: "toc"}
	if chunked {
		about.Format, about.Why = "zstd:chunked", "its table of contents is named by the manifest ("+string(position.Dialect)+")"
		l, err = p.zstdChunked(position)
	} else {
		about.Format, about.Why = "estargz", "its table of contents is named by the manifest"
		l, about.Landmark, err = p.eStargz(toc)
	}
	if err != nil {
		return err
	}
	return p.keep(g, l, about, p.fetched, false)
}

// section reads [off, off+n) of a layer's blob into memory.
func (p *preparation) section(off, n int64) ([]byte, error) {
	if n < 0 || n > index.MaxTOCBlob || off < 0 || off > p.Size-n {
		return nil, fmt.Errorf("%w: a table of contents of %d bytes at %d of a blob of %d, the limit is %d", index.ErrMalformed, n, off, p.Size, index.MaxTOCBlob)
	}
	r := p.reader(off, off+n)
	r.ranged = true
	defer r.Close()
	if remote(p.Blob) {
		r.trip, _ = p.schedule.begin(p.ctx, Demand, n, nil)
		defer r.trip.end()
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

func (p *preparation) reader(off, end int64) *reader {
	const reason = "index"
	r := newReader(withReason(p.ctx, reason), p.Blob, off, end, p.patience)
	if remote(p.Blob) {
		r.count = func(n int) {
			p.fetched += int64(n)
			p.m.FetchBytes.WithLabelValues(reason).Add(float64(n))
		}
	}
	r.retry = p.m.FetchRetries.WithLabelValues(reason).Inc
	return r
}

func (p *preparation) zstdChunked(at zstdchunked.Position) (*index.Layer, error) {
	toc, err := p.section(at.Offset, at.Length)
	if err != nil {
		return nil, err
	}
	l, err := zstdchunked.Read(bytes.NewReader(toc), at, p.Size)
	return l, p.indexError(err)
}

// eStargz asks for the end of the blob, large enough that footer and table of
// contents mostly come in one round trip, and then for what was not in it.
func (p *preparation) eStargz(digest string) (*index.Layer, int64, error) {
	n := estargz.TailSize(p.Size)
	tail, err := p.section(p.Size-n, n)
	if err != nil {
		return nil, 0, err
	}
	off, length, err := estargz.Locate(tail, p.Size)
	if err != nil {
		return nil, 0, p.indexError(err)
	}
	toc := tail
	if start := p.Size - n; off < start {
		head, err := p.section(off, start-off)
		if err != nil {
			return nil, 0, err
		}
		toc = append(head, tail...)
	} else {
		toc = tail[off-start:]
	}
	l, mark, err := estargz.Read(bytes.NewReader(toc[:min(length, int64(len(toc)))]), digest, p.Size, off)
	return l, mark.End, p.indexError(err)
}

func (p *preparation) indexError(err error) error {
	if err != nil {
		p.m.VerifyFailures.WithLabelValues("index").Inc()
		return fmt.Errorf("its table of contents: %w", err)
	}
	return nil
}

// whole reads a layer from its first byte to its last and checks what its manifest
// and config say of it.
func (p *preparation) whole(r io.Reader, sink tarscan.Sink, o tarscan.Options) (*index.Layer, About, error) {
	l, res, format, err := scan(p.ctx, r, sink, o)
	if err != nil {
		return nil, About{}, err
	}
	if got := res.Digest.String(); got != p.Digest {
		p.m.VerifyFailures.WithLabelValues("layer").Inc()
		return nil, About{}, fmt.Errorf("%w: the blob's digest is %s", ErrVerify, got)
	}
	if err := p.checkDiffID(res.DiffID.String()); err != nil {
		if errors.Is(err, ErrVerify) {
			p.m.VerifyFailures.WithLabelValues("layer").Inc()
		}
		return nil, About{}, err
	}
	return l, About{Format: format, Index: "checkpoints", DiffID: res.DiffID.String(), Size: p.Size, Uncompressed: res.Uncompressed}, nil
}

// scan streams a layer's blob into sink and names its format.
func scan(ctx context.Context, r io.Reader, sink tarscan.Sink, o tarscan.Options) (*index.Layer, tarscan.Result, string, error) {
	br := bufio.NewReaderSize(r, blockSize)
	first, _ := br.Peek(4) // what is wrong with it, the scan will find
	c := tarscan.Detect(first)
	format := "tar"
	if c != tarscan.Plain {
		format += "+" + c.String()
	}
	l, res, err := tarscan.Scan(ctx, br, c, sink, o)
	return l, res, format, err
}

// restream fills frames that cannot be had by themselves by reading the layer
// once more from its start. Only what is missing is written.
func (l *Layer) restream(frames []int) {
	blob, err := l.blob()
	if err == nil {
		l.f.m.LazyFallbacks.WithLabelValues("dropped").Inc()
		frames = merge(frames, l.claimRest(true))
		if err := l.punch(frames); err != nil {
			l.land(err, frames...)
			return
		}
		r := l.open(blob, 0, blob.Size(), nil)
		var res tarscan.Result
		_, res, _, err = scan(l.ctx, r, missingOnly{l, frames}, tarscan.Options{})
		r.Close()
		if err == nil && res.Digest.String() != l.Digest {
			l.f.m.VerifyFailures.WithLabelValues("layer").Inc()
			err = fmt.Errorf("%w: the blob's digest is %s", ErrVerify, res.Digest)
		}
	}
	l.land(err, frames...)
}

// punch clears what a pass that skips zeroes would leave as it is.
func (l *Layer) punch(frames []int) error {
	for _, f := range frames {
		for _, p := range l.frames.FramePieces(f) {
			if err := l.data.Punch(p.Data, p.Size); err != nil {
				return fmt.Errorf("clear a missing range of %v: %w", l, err)
			}
		}
	}
	return nil
}

// missingOnly keeps a second pass away from what was verified, or is on its way
// to be, by others.
type missingOnly struct {
	l      *Layer
	frames []int // that the pass is to bring, ascending
}

func (w missingOnly) WriteAt(p []byte, off int64) (int, error) {
	from, to := w.l.frames.PiecesIn(off, int64(len(p)))
	for i := from; i < to; i++ {
		piece := w.l.frames.Piece(i)
		if _, ours := slices.BinarySearch(w.frames, piece.Frame); !ours {
			continue
		}
		a, b := max(off, piece.Data), min(off+int64(len(p)), piece.Data+piece.Size)
		if _, err := w.l.data.File().WriteAt(p[a-off:b-off], a); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
