// Package soci reads and writes the formats of SOCI (awslabs/soci-snapshotter):
// the zTOC, which describes a layer whose blob stays as it is, and the index
// manifest, which says where the zTOCs of an image are.
//
// A zTOC is a flatbuffer of two parts: what lies where in the layer's tar, and
// for each span of the blob a digest and the point from which it can be
// decompressed. Its tar headers are not in it, so everything of the tar that is
// no file's contents is laid behind the contents in the data file: a layer of
// which everything is present can be given out as the tar that it was.
package soci

import (
	"fmt"
	"runtime"
	"slices"

	flatbuffers "github.com/google/flatbuffers/go"

	"github.com/varvefs/varve/index"
)

// Layer is a layer as a zTOC describes it.
type Layer struct {
	index.Layer
	Contents     int64 // bytes of the data file that files take; behind them lie the tar's own bytes
	Uncompressed int64 // bytes of the tar, as far as the zTOC knows it: see [Layer.Tar]
}

// Read turns a zTOC into a layer, each of whose frames is a span. blobSize is
// the size of the layer's blob in bytes, for which the zTOC must be made. The
// layer keeps none of ztoc's memory, which must not change meanwhile.
func Read(ztoc []byte, blobSize int64) (l *Layer, err error) {
	if len(ztoc) > index.MaxTOCSize {
		return nil, fmt.Errorf("%w: zTOC of %d bytes, the limit is %d", index.ErrMalformed, len(ztoc), int64(index.MaxTOCSize))
	}
	// The flatbuffers library checks nothing: what points outside of the bytes
	// ends in a slice that is out of bounds.
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		if _, ok := r.(runtime.Error); !ok {
			panic(r)
		}
		l, err = nil, fmt.Errorf("%w: zTOC: %v", index.ErrMalformed, r)
	}()
	l, err = read(slices.Clip(ztoc), blobSize)
	if err != nil {
		return nil, fmt.Errorf("zTOC: %w", err)
	}
	return l, nil
}

func read(ztoc []byte, blobSize int64) (*Layer, error) {
	root := table{flatbuffers.Table{Bytes: ztoc, Pos: flatbuffers.GetUOffsetT(ztoc)}}
	if v := root.text(ztocVersion); v != version {
		return nil, fmt.Errorf("%w: version %.20q, want %q", index.ErrMalformed, v, version)
	}
	compressed, size := root.int64(ztocCompressed), root.int64(ztocUncompressed)
	if compressed != blobSize {
		return nil, fmt.Errorf("%w: made for a blob of %d bytes, not of %d", index.ErrMalformed, compressed, blobSize)
	}
	if size < 0 || size > index.MaxDataSize {
		return nil, fmt.Errorf("%w: tar of %d bytes, the limit is %d", index.ErrMalformed, size, int64(index.MaxDataSize))
	}
	info, ok := root.table(ztocInfo)
	if !ok {
		return nil, fmt.Errorf("%w: no compression info", index.ErrMalformed)
	}
	s, err := readSpans(info, blobSize, size)
	if err != nil {
		return nil, err
	}
	defer s.points.wait()
	size = s.size
	r := &reader{b: index.NewBuilder(s.kind), size: size, bytes: 2 * index.MaxMeta, records: len(ztoc) / 4}
	if toc, ok := root.table(ztocTOC); ok {
		if err := r.entries(toc); err != nil {
			return nil, err
		}
	}
	contents := r.b.Reserved()
	if err := s.lay(r.b, r.files); err != nil {
		return nil, err
	}
	points, err := s.points.wait()
	if err != nil {
		return nil, err
	}
	l, err := r.b.Layer(blobSize)
	if err != nil {
		return nil, err
	}
	l.Points = points
	return &Layer{Layer: *l, Contents: contents, Uncompressed: size}, nil
}
