package main

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/inflate"
	"github.com/varvefs/varve/index/tarscan"
	"github.com/varvefs/varve/index/zstdblocks"
)

// decompressVerb has this program decompress one blob, as a process of its own, and
// say what that took.
const decompressVerb = "decompress"

// The ways to decompress.
const (
	wayGzipPoints    = "inflate, points"
	wayInflate       = "inflate"
	wayGzipKlauspost = "klauspost gzip"
	wayGzipGo        = "Go gzip"
	wayZstdPoints    = "zstdblocks, points"
	wayZstdBlocks    = "zstdblocks"
	wayZstdOne       = "klauspost zstd, 1 goroutine"
	wayZstdMany      = "klauspost zstd"
)

// What package tarscan makes points by; it does not say so.
const (
	pointsShare = 150
	blockSpans  = 16
)

// decompressed is what one process found.
type decompressed struct {
	CPU        time.Duration
	Size       int64 // of the contents
	Points     int
	PointBytes int64
}

// decompress runs this program once more.
func decompress(ctx context.Context, way, file string) (d decompressed, err error) {
	self, err := os.Executable()
	if err != nil {
		return d, err
	}
	cmd := exec.CommandContext(ctx, self, decompressVerb, way, file)
	cmd.Stderr = os.Stderr
	said, err := cmd.Output()
	if err != nil {
		return d, err
	}
	return d, json.Unmarshal(said, &d)
}

func decompressOnce(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%s WAY FILE", decompressVerb)
	}
	blob, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	runtime.GC()
	before, err := ownCPU()
	if err != nil {
		return err
	}
	d, err := decompressBy(args[0], bytes.NewReader(blob))
	if err != nil {
		return err
	}
	after, err := ownCPU()
	if err != nil {
		return err
	}
	d.CPU = after - before
	return json.NewEncoder(os.Stdout).Encode(d)
}

// ownCPU is what this process has computed, all threads.
func ownCPU() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

func decompressBy(way string, blob io.Reader) (d decompressed, err error) {
	var w index.PointsWriter
	var r io.Reader
	switch way {
	case wayGzipPoints:
		s := spans{points: &w}
		r = inflate.NewReader(blob, inflate.Options{Want: s.want, Point: w.Add})
	case wayInflate:
		r = inflate.NewReader(blob, inflate.Options{})
	case wayGzipKlauspost:
		r, err = gzip.NewReader(blob)
	case wayGzipGo:
		r, err = stdgzip.NewReader(blob)
	case wayZstdPoints:
		s := spans{points: &w}
		z := zstdblocks.NewReader(blob, zstdblocks.Options{Want: s.wantBlock, Point: w.Add})
		defer z.Close()
		r = z
	case wayZstdBlocks:
		z := zstdblocks.NewReader(blob, zstdblocks.Options{})
		defer z.Close()
		r = z
	case wayZstdOne, wayZstdMany:
		var o []zstd.DOption
		if way == wayZstdOne {
			o = append(o, zstd.WithDecoderConcurrency(1))
		}
		var z *zstd.Decoder
		if z, err = zstd.NewReader(blob, o...); err == nil {
			defer z.Close()
			r = z
		}
	default:
		err = fmt.Errorf("no way %q", way)
	}
	if err != nil {
		return d, err
	}
	// Without WriteTo, which some have: a pass reads into buffers of its own.
	if d.Size, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 128<<10)); err != nil {
		return d, err
	}
	if p := w.Points(); p != nil {
		d.Points, d.PointBytes = p.Len(), w.Bytes()
	}
	return d, nil
}

// spans chooses points as a pass does.
type spans struct {
	points *index.PointsWriter
	chosen int
	last   int64
}

func (s *spans) want(_ int64, _ uint8, out int64) bool {
	if s.chosen > 0 && (out-s.last < tarscan.DefaultSpan || s.points.Bytes() > out/pointsShare || s.chosen >= index.MaxPoints) {
		return false
	}
	s.chosen++
	s.last = out
	return true
}

func (s *spans) wantBlock(in, out int64, inFrame bool) bool {
	if inFrame && s.chosen > 0 && out-s.last < blockSpans*tarscan.DefaultSpan {
		return false
	}
	return s.want(in, 0, out)
}
