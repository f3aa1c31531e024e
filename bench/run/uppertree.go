package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	commitMedian = 8 << 10 // bytes of a file
	commitSpread = 1.9     // sigma: the mean is six times the median
	commitPool   = 48 << 20
	commitSeed   = 20
)

// fillUpper makes the tree that is committed: dir with commitFiles files of
// commitBytes together.
func (b *bench) fillUpper(ctx context.Context, dir string) error {
	start := time.Now()
	pool, err := sourceText(ctx)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(commitSeed, 0))
	noise := rand.NewChaCha8([32]byte{commitSeed})
	var buf []byte
	random, text := 0, 0
	for i, size := range commitSizes(r) {
		if err := ctx.Err(); err != nil {
			return err
		}
		sub := filepath.Join(dir, fmt.Sprintf("d%02d", i/1000), fmt.Sprintf("d%02d", i/20%50))
		if i%20 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return err
			}
		}
		buf = buf[:0]
		if random < text {
			buf = append(buf, make([]byte, size)...)
			noise.Read(buf) // never fails
			random += size
		} else {
			buf = appendText(buf, r, pool, size)
			text += size
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%05d", i)), buf, 0o644); err != nil {
			return err
		}
	}
	b.say("wrote %d files, %s MB random and %s MB text, in %s", commitFiles, mb(int64(random)), mb(int64(text)), time.Since(start).Round(time.Millisecond))
	return nil
}

// commitSizes gives the sizes of the files, log-normal as in most trees.
func commitSizes(r *rand.Rand) []int {
	sizes, sum := make([]float64, commitFiles), 0.0
	for i := range sizes {
		sizes[i] = min(commitMedian*math.Exp(commitSpread*r.NormFloat64()), 32<<20)
		sum += sizes[i]
	}
	out, left := make([]int, commitFiles), commitBytes
	for i, s := range sizes {
		out[i] = int(s * commitBytes / sum)
		left -= out[i]
	}
	out[0] += left // what rounding has taken
	return out
}

// appendText appends size bytes of text: pieces of the pool with words of their
// own in them, so that no two files are the same.
func appendText(buf []byte, r *rand.Rand, pool []byte, size int) []byte {
	for left := size; left > 0; {
		n := min(left, 1<<10+r.IntN(8<<10))
		from := r.IntN(len(pool) - n)
		buf = append(buf, pool[from:from+n]...)
		if n > 64 {
			copy(buf[len(buf)-n+r.IntN(n-16):], fmt.Sprintf("%016x", r.Uint64()))
		}
		left -= n
	}
	return buf
}

// sourceText is the text of the sources of the Go that runs this.
func sourceText(ctx context.Context) ([]byte, error) {
	root, _, err := goTree(ctx)
	if err != nil {
		return nil, err
	}
	var pool bytes.Buffer
	err = filepath.WalkDir(filepath.Join(root, "src"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		text, err := os.ReadFile(path)
		pool.Write(text)
		if err == nil && pool.Len() > commitPool {
			err = fs.SkipAll
		}
		return err
	})
	if err == nil && pool.Len() < 1<<20 {
		err = errors.New("the tree of Go has hardly any sources")
	}
	return pool.Bytes(), err
}
