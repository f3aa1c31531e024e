package forms

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// layer is a blob in a directory. It is what ggcr's partial package completes
// to a v1.Layer.
type layer struct {
	path   string
	desc   v1.Descriptor
	diffID v1.Hash
}

func (l *layer) Digest() (v1.Hash, error)            { return l.desc.Digest, nil }
func (l *layer) DiffID() (v1.Hash, error)            { return l.diffID, nil }
func (l *layer) Size() (int64, error)                { return l.desc.Size, nil }
func (l *layer) MediaType() (types.MediaType, error) { return l.desc.MediaType, nil }
func (l *layer) Compressed() (io.ReadCloser, error)  { return os.Open(l.path) }
func (l *layer) Descriptor() (*v1.Descriptor, error) { return l.desc.DeepCopy(), nil }

// writeLayer gives an uncompressed tar the form asked for.
func writeLayer(ctx context.Context, src io.Reader, form Form, opts Options) (_ *layer, err error) {
	f, err := os.CreateTemp(opts.Dir, "blob-*")
	if err != nil {
		return nil, err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	out := newCounter(f)
	in := &hashReader{ctx: ctx, r: src, h: sha256.New()}
	l := &layer{desc: v1.Descriptor{MediaType: form.mediaType(), Annotations: map[string]string{}}}

	switch form {
	case Tar:
		_, err = io.Copy(out, in)
	case Gzip:
		err = writeGzip(out, in, opts.level())
	case Zstd:
		err = writeZstd(out, in)
	case ZstdChunkedContainers:
		err = writeContainers(out, in, l.desc.Annotations)
	case EStargz, ZstdChunked:
		err = writeStargz(ctx, out, in, form, opts, l)
	default:
		err = fmt.Errorf("no form %q", form)
	}
	if err == nil {
		err = out.buf.Flush()
	}
	if err != nil {
		return nil, err
	}
	if l.diffID.Hex == "" { // the form keeps the stream as it is
		if _, err = io.Copy(io.Discard, in); err != nil {
			return nil, err
		}
		l.diffID = hashOf(in.h)
	}
	if len(l.desc.Annotations) == 0 {
		l.desc.Annotations = nil
	}
	l.desc.Digest, l.desc.Size = hashOf(out.h), out.n
	l.path = filepath.Join(opts.Dir, "sha256-"+l.desc.Digest.Hex)
	return l, os.Rename(f.Name(), l.path)
}

func writeGzip(w io.Writer, r io.Reader, level int) error {
	zw, err := gzip.NewWriterLevel(w, level)
	if err != nil {
		return err
	}
	if _, err := io.Copy(zw, r); err != nil {
		return err
	}
	return zw.Close()
}

// newZstd makes an encoder whose output does not depend on the machine.
func newZstd(w io.Writer) (*zstd.Encoder, error) {
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
}

func writeZstd(w io.Writer, r io.Reader) error {
	zw, err := newZstd(w)
	if err != nil {
		return err
	}
	if _, err := io.Copy(zw, r); err != nil {
		return err
	}
	return zw.Close()
}

// writeStargz fills in the diffID and the annotations too: estargz writes the
// tar anew, with a landmark and, for gzip, the TOC in it.
func writeStargz(ctx context.Context, w io.Writer, r io.Reader, form Form, opts Options, l *layer) error {
	plain, err := os.CreateTemp(opts.Dir, "tar-*")
	if err != nil {
		return err
	}
	defer os.Remove(plain.Name())
	defer plain.Close()
	size, err := io.Copy(plain, r)
	if err != nil {
		return err
	}
	var missed []string
	build := []estargz.Option{
		estargz.WithContext(ctx),
		estargz.WithChunkSize(opts.chunkSize()),
		estargz.WithCompressionLevel(opts.level()),
		estargz.WithParallelism(2), // it decides where members begin
		estargz.WithPrioritizedFiles(opts.Prioritized),
		estargz.WithAllowPrioritizeNotFound(&missed),
	}
	meta := map[string]string{}
	if form == ZstdChunked {
		build = append(build, estargz.WithCompression(struct {
			*zstdchunked.Compressor
			*zstdchunked.Decompressor
		}{
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: meta},
			&zstdchunked.Decompressor{},
		}))
	}
	blob, err := estargz.Build(io.NewSectionReader(plain, 0, size), build...)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, blob)
	if cerr := blob.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	uncompressed, err := blob.UncompressedSize()
	if err != nil {
		return err
	}
	maps.Copy(l.desc.Annotations, meta)
	l.desc.Annotations[estargz.TOCJSONDigestAnnotation] = blob.TOCDigest().String()
	l.desc.Annotations[estargz.StoreUncompressedSizeAnnotation] = strconv.FormatInt(uncompressed, 10)
	l.diffID, err = v1.NewHash(blob.DiffID().String())
	return err
}

// counter counts and digests what is written.
type counter struct {
	buf *bufio.Writer
	h   hash.Hash
	n   int64
}

func newCounter(w io.Writer) *counter {
	return &counter{buf: bufio.NewWriterSize(w, 1<<20), h: sha256.New()}
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.buf.Write(p)
	c.h.Write(p[:n])
	c.n += int64(n)
	return n, err
}

// hashReader digests what is read, and ends with its context.
type hashReader struct {
	ctx context.Context
	r   io.Reader
	h   hash.Hash
}

func (r *hashReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	r.h.Write(p[:n])
	return n, err
}

func hashOf(h hash.Hash) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
}
