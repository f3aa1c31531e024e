package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/klauspost/compress/zstd"
)

const (
	pointsTarget = 1.15    // times decompression alone
	leastLayer   = 8 << 20 // bytes of a blob that is worth measuring
)

// zstdForms are the zstd blobs that are made of each layer. A script has the gzip
// blob as $0 and writes the other to its output; without one klauspost's encoder
// makes frames of so many bytes, 0 for one.
var zstdForms = []struct {
	name, script string
	frame        int64
}{
	{"zstd -3, one frame", `set -o pipefail; gzip -dc "$0" | zstd -3 -q -c`, 0},
	{"zstd -3, a frame each 4 MiB", `set -o pipefail; gzip -dc "$0" | split -b 4M --filter="zstd -3 -q -c" -`, 0},
	{"klauspost, one frame", "", 0},
	{"klauspost, a frame each 4 MiB", "", 4 << 20},
}

func (b *bench) checkpoints(ctx context.Context, out *section) error {
	images, n := b.imagesOr("python", "node"), b.turns(7)
	layers, err := b.largeLayers(ctx, images)
	if err != nil {
		return err
	}
	out.line("CPU, user and system, of decompressing a layer's blob out of memory into nothing, each time in a process of its own that does nothing else, collections of garbage included. *points*: by `index/inflate` or `index/zstdblocks` with points where a pass makes them (every 512 KiB of gzip and at frames of zstd, every 8 MiB within those, less often where they would take more than 1/%d of the contents), their states compressed by `index.PointsWriter`; hashing is not in it. *alone*: the faster one of klauspost's and Go's gzip, or of klauspost's zstd with one goroutine and with as many as it likes. The layers of %s of more than %d MiB, in turns, medians of n=%d. Target: at most %.2f.", pointsShare, strings.Join(images, ", "), leastLayer>>20, n, pointsTarget)
	out.line("")
	out.line("| layer | MB, compressed | blob | points CPU ms | least | alone CPU ms | least | which | points / alone | by least | target | without points / alone | points | KiB, all |")
	out.line("|---|--:|---|--:|--:|--:|--:|---|--:|--:|---|--:|--:|--:|")
	sums := map[string][2]time.Duration{}
	var order []string
	for _, l := range layers {
		for _, f := range l.files {
			ours, rival, err := b.decompressAll(ctx, out, l, f, n)
			if err != nil {
				return fmt.Errorf("layer %.19s, %s: %w", l.digest, f.form, err)
			}
			if _, ok := sums[f.form]; !ok {
				order = append(order, f.form)
			}
			s := sums[f.form]
			sums[f.form] = [2]time.Duration{s[0] + ours, s[1] + rival}
		}
	}
	out.line("")
	out.line("All layers together:")
	out.line("")
	out.line("| blob | points / alone | target |")
	out.line("|---|--:|---|")
	for _, form := range order {
		r := float64(sums[form][0]) / float64(sums[form][1])
		out.line("| %s | %.2f | <= %.2f %s |", form, r, pointsTarget, verdict(r, pointsTarget))
	}
	return nil
}

// decompressAll has a blob decompressed in all ways and gives what ours and the
// fastest rival take.
func (b *bench) decompressAll(ctx context.Context, out *section, l layerFiles, f blobFile, n int) (ours, rival time.Duration, err error) {
	ways := []string{wayZstdPoints, wayZstdBlocks, wayZstdOne, wayZstdMany}
	if f.form == "gzip" {
		ways = []string{wayGzipPoints, wayInflate, wayGzipKlauspost, wayGzipGo}
	}
	got := map[string][]decompressed{}
	for i := range n {
		for _, way := range turn(ways, i) {
			d, err := decompress(ctx, way, f.path)
			if err != nil {
				return 0, 0, fmt.Errorf("%s: %w", way, err)
			}
			if first := got[ways[0]]; len(first) > 0 && d.Size != first[0].Size {
				return 0, 0, fmt.Errorf("%s gives %d bytes where %s gives %d", way, d.Size, ways[0], first[0].Size)
			}
			got[way] = append(got[way], d)
		}
	}
	cpu := func(way string) []time.Duration {
		return pickFrom(got[way], func(d decompressed) time.Duration { return d.CPU })
	}
	which := ways[2]
	if median(cpu(ways[3])) < median(cpu(which)) {
		which = ways[3]
	}
	mine, bare, theirs := cpu(ways[0]), cpu(ways[1]), cpu(which)
	ours, rival = median(mine), median(theirs)
	ratio := float64(ours) / float64(rival)
	first := got[ways[0]][0]
	out.line("| %.8s | %s | %s | %s | %s | %s | %s | %s | %.2f | %.2f | <= %.2f %s | %.2f | %d | %d |", l.digest.Hex, mb(f.size), f.form, ms(ours), ms(lowest(mine)),
		ms(rival), ms(lowest(theirs)), which, ratio, float64(lowest(mine))/float64(lowest(theirs)), pointsTarget, verdict(ratio, pointsTarget),
		float64(median(bare))/float64(rival), first.Points, first.PointBytes>>10)
	for _, way := range ways {
		b.say("checkpoints %.8s %s, %s: CPU ms %s", l.digest.Hex, f.form, way, all(cpu(way), ms))
	}
	return ours, rival, nil
}

// layerFiles is a layer in the forms it is measured in, as files that stay.
type layerFiles struct {
	digest v1.Hash
	files  []blobFile
}

type blobFile struct {
	form, path string
	size       int64
}

// largeLayers gives the larger layers of images, each once.
func (b *bench) largeLayers(ctx context.Context, images []string) (out []layerFiles, err error) {
	seen := map[v1.Hash]bool{}
	for _, image := range images {
		ref, err := b.reference(image, tagPlain)
		if err != nil {
			return nil, err
		}
		img, err := remote.Image(ref, remote.WithContext(ctx))
		if err != nil {
			return nil, fmt.Errorf("read %s (%s): %w", ref, needs, err)
		}
		layers, err := img.Layers()
		if err != nil {
			return nil, err
		}
		for _, l := range layers {
			d, err := l.Digest()
			if err != nil {
				return nil, err
			}
			size, err := l.Size()
			if err != nil {
				return nil, err
			}
			if size < leastLayer || seen[d] {
				continue
			}
			seen[d] = true
			f, err := b.layerForms(ctx, l, d)
			if err != nil {
				return nil, fmt.Errorf("layer %.19s of %s: %w", d, image, err)
			}
			out = append(out, layerFiles{d, f})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no layer of %s has %d bytes", strings.Join(images, ", "), leastLayer)
	}
	return out, nil
}

// layerForms keeps the blob of a layer and makes the others of it.
func (b *bench) layerForms(ctx context.Context, l v1.Layer, d v1.Hash) ([]blobFile, error) {
	base := filepath.Join(b.dir, "layer-"+d.Hex[:16])
	gz := base + ".gz"
	if err := made(gz, func(path string) error { return toFile(path, l.Compressed) }); err != nil {
		return nil, err
	}
	files := []blobFile{{form: "gzip", path: gz}}
	for i, f := range zstdForms {
		path := fmt.Sprintf("%s.%d.zst", base, i)
		if err := made(path, func(path string) error {
			if f.script != "" {
				return b.command(ctx, "bash", "-c", "("+f.script+`) > "$1"`, gz, path)
			}
			return toFile(path, func() (io.ReadCloser, error) { return framed(l, f.frame) })
		}); err != nil {
			return nil, err
		}
		files = append(files, blobFile{form: f.name, path: path})
	}
	for i := range files {
		st, err := os.Stat(files[i].path)
		if err != nil {
			return nil, err
		}
		files[i].size = st.Size()
	}
	return files, nil
}

func toFile(path string, open func() (io.ReadCloser, error)) error {
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	return f.Close()
}

// framed compresses a layer's tar as zstd, in frames of so many bytes, 0 for one.
func framed(l v1.Layer, frame int64) (io.ReadCloser, error) {
	tar, err := l.Uncompressed()
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		defer tar.Close()
		w.CloseWithError(compressFrames(w, tar, frame))
	}()
	return r, nil
}

func compressFrames(w io.Writer, tar io.Reader, frame int64) error {
	enc, err := zstd.NewWriter(w)
	if err != nil {
		return err
	}
	if frame == 0 {
		if _, err := io.Copy(enc, tar); err != nil {
			return err
		}
		return enc.Close()
	}
	for {
		n, err := io.CopyN(enc, tar, frame)
		if err != nil && err != io.EOF {
			return err
		}
		last := err == io.EOF
		if n > 0 || !last {
			if err := enc.Close(); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
		enc.Reset(w)
	}
}
