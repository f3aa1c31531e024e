package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
	"github.com/varvefs/varve/index/tarscan"
)

// Shared is what others can read a layer by, instead of reading it whole.
type Shared struct {
	Bundle       []byte // an index.Bundle
	ZTOC         []byte // of SOCI; nil where it does not know the compression
	SpanSize     int64  // bytes of the tar that a span of the zTOC covers
	Format       string // of the layer
	Entries      int
	Uncompressed int64 // bytes of the tar
}

// Share makes a layer's indexes of what was kept when it was read whole.
func (h *Handle) Share() (*Shared, error) {
	about := h.About()
	if about.Index != "checkpoints" {
		return nil, fmt.Errorf("%v was not read whole", h.Layer)
	}
	entries, err := h.Entries()
	if err != nil {
		return nil, err
	}
	skeleton, err := h.f.store.Document(h.Key, skeletonDocument)
	if err != nil {
		return nil, err
	}
	l := &index.Layer{Entries: entries, Frames: h.frames, Points: h.points}
	return share(l, about, h.Digest, bytes.NewReader(skeleton), tarscan.DefaultDigestSpan)
}

// Index makes a layer's indexes with spans of its own size, by reading all of it.
// Nothing of it is kept.
func (f *Fetcher) Index(ctx context.Context, q Request, span int64) (*Shared, error) {
	if q.Blob == nil {
		return nil, ErrOffline
	}
	skeleton, err := f.store.Temp()
	if err != nil {
		return nil, err
	}
	defer os.Remove(skeleton.Name())
	defer skeleton.Close()
	p := preparation{Fetcher: f, Request: q, ctx: ctx}
	r := p.reader(0, q.Size)
	defer r.Close()
	l, about, err := p.whole(r, nowhere{}, tarscan.Options{Span: span, DigestSpan: span, Skeleton: skeleton})
	if err == nil {
		_, err = skeleton.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %.19s: %w", q.Digest, err)
	}
	return share(l, about, q.Digest, skeleton, span)
}

// nowhere is a sink that keeps nothing.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func (nowhere) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func share(l *index.Layer, about About, digest string, skeleton io.Reader, span int64) (*Shared, error) {
	s := &Shared{SpanSize: span, Format: about.Format, Entries: len(l.Entries), Uncompressed: about.Uncompressed}
	var b bytes.Buffer
	err := index.WriteBundle(&b, &index.Bundle{
		Layer: *l, Digest: digest, DiffID: about.DiffID, Size: about.Size, Uncompressed: about.Uncompressed, Format: about.Format,
	})
	if err != nil {
		return nil, fmt.Errorf("layer %.19s: %w", digest, err)
	}
	s.Bundle = b.Bytes()
	if about.Format == "tar+zstd" || l.Points == nil {
		return s, nil
	}
	var points []index.Point
	for i := range l.Points.Len() {
		if l.Points.At(i).Digest == unknown {
			continue
		}
		p, err := l.Points.Point(i)
		if err != nil {
			return nil, err
		}
		points = append(points, p)
	}
	tar, err := tarscan.OpenSkeleton(skeleton, nowhere{})
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	var z bytes.Buffer
	err = soci.Write(&z, soci.Source{
		Tar: tar, Compressed: about.Size, Uncompressed: about.Uncompressed, Gzip: about.Format == "tar+gzip",
		SpanSize: span, Points: points, Tool: soci.BuildTool,
	})
	if errors.Is(err, soci.ErrUnfit) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("layer %.19s: zTOC: %w", digest, err)
	}
	s.ZTOC = z.Bytes()
	return s, nil
}
