package commit

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/vbatts/tar-split/tar/storage"
)

// unfit is why a form cannot hold a layer.
type unfit struct{ error }

func (u unfit) Unwrap() error { return u.error }

// asUnfit knows what only shows while a layer is packed: Podman refuses a table of
// contents with two entries of one name, and so does the writer of its tar-split.
func asUnfit(err error) error {
	if errors.Is(err, storage.ErrDuplicatePath) {
		return unfit{errors.New("two of its entries have one name, which zstd:chunked cannot hold: choose another compression")}
	}
	return err
}

// plainStargz is eStargz with a member for each file, as it was at first. It takes
// more room than [stargzForm], which commits have; but it is what everybody reads:
// the library's own VerifyTOC, and Podman, know nothing of several files in one
// member.
var plainStargz = form{frame: stargzForm.frame, chunk: stargzForm.chunk, codec: stargzForm.codec}

// newConvertPacker is [NewPacker] for layers that other tools are to read. If
// front says so, files are to come before eStargz's landmark: [endFront] adds it.
func newConvertPacker(w io.Writer, o PackOptions, front bool) *Packer {
	if o.Compression != EStargz {
		return NewPacker(w, o)
	}
	workers := o.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	p := &Packer{compression: EStargz, buf: make([]byte, 256<<10), toc: newStargz()}
	p.line = newLine(w, plainStargz, p.toc, min(workers, maxWorkers))
	p.cut.form, p.cut.line = plainStargz, p.line
	p.tar = tar.NewWriter(&p.cut)
	if !front {
		p.landmark(context.Background(), stargzLandmark())
	}
	return p
}

func (p *Packer) landmark(ctx context.Context, h *tar.Header) {
	if err := p.add(ctx, asWritten(h), strings.NewReader(landmarkContent)); err != nil {
		p.line.fail(err)
	}
}

// endFront marks that all before it is to be fetched before it is asked for. Only
// eStargz has a mark for that.
func endFront(ctx context.Context, p *Packer) error {
	if p.compression != EStargz {
		return nil
	}
	h := stargzLandmark()
	h.Name = estargz.PrefetchLandmark
	p.landmark(ctx, h)
	return p.failed()
}

// repack writes the entries of a tar, but for those whose numbers are in skip.
func repack(ctx context.Context, p *Packer, t *layerReader, skip map[int]bool) error {
	for {
		e, err := t.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return asMalformed(err)
		}
		if skip[e.number] {
			continue
		}
		var r io.Reader
		if e.head.Size > 0 {
			r = t.tr
		}
		if err := addAgain(ctx, p, e.head, r); err != nil {
			return asMalformed(err)
		}
	}
}

// addAgain adds an entry that was read from another layer.
func addAgain(ctx context.Context, p *Packer, h *tar.Header, r io.Reader) error {
	if err := p.Check(h); err != nil {
		return unfit{err}
	}
	// RFC 3339 has four digits for a year, and readers take the year 1 for none.
	if y := h.ModTime.UTC().Year(); p.toc != nil && (y < 2 || y > 9999) {
		return unfit{fmt.Errorf("%q is of the year %d, which no table of contents can hold: choose the compression gzip or zstd", h.Name, y)}
	}
	if p.toc != nil {
		// Podman's table has them too.
		for _, t := range []int{h.AccessTime.UTC().Year(), h.ChangeTime.UTC().Year()} {
			if t < 0 || t > 9999 {
				return unfit{fmt.Errorf("%q has a time of the year %d, which no table of contents can hold: choose the compression gzip or zstd", h.Name, t)}
			}
		}
	}
	return p.Add(ctx, h, r)
}
