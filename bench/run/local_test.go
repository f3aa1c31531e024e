package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLocalWorksHaveTargets(t *testing.T) {
	b := &bench{local: localOptions{files: 100, megabytes: 1}}
	works := b.localWorks("names")
	if len(works)*len(faces) != len(localGoals) {
		t.Errorf("%d works and %d goals", len(works), len(localGoals))
	}
	for _, w := range works {
		want := map[string]float64{}
		for _, g := range localGoals {
			if g.measure == w.measure && g.unit == w.unit {
				want[g.system] = g.want
			}
		}
		if d := cmp.Diff(want, targets(w.measure)); d != "" || len(want) != len(faces) {
			t.Errorf("%s in %s (-goals +targets):\n%s", w.measure, w.unit, d)
		}
	}
}

func TestReadVerb(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{"a/one": 10, "a/two": 0, "b": 200_000, "c": 20_000, "large": 64 * randomBlock} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	list, n, err := smallFiles(dir, 100, 100_000)
	if want := "a/one\x00a/two\x00c\x00"; err != nil || n != 3 || string(list) != want {
		t.Fatalf("small files %q, %d, %v", list, n, err)
	}
	if list, n, err := smallFiles(dir, 2, 1<<30); err != nil || n != 2 || string(list) != "a/one\x00b\x00" {
		t.Errorf("two of the files: %q, %d, %v", list, n, err)
	}
	names := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(names, list, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, c := range []struct {
		way, file string
		more      []string
		want      readOf
	}{
		{readEach, names, nil, readOf{Reads: 3, Bytes: 20_010}},
		{readSequential, "b", nil, readOf{Reads: 1, Bytes: 200_000}},
		{readRandom, "large", []string{"1", "32"}, readOf{Reads: 32, Bytes: 32 * randomBlock}},
		{readAdvised, "large", []string{"1", "7"}, readOf{Reads: 7, Bytes: 7 * randomBlock}},
	} {
		work, err := prepareRead(c.way, c.file, c.more)
		if err != nil {
			t.Fatal(err)
		}
		var got readOf
		if err := work(&got); err != nil || got != c.want {
			t.Errorf("%s %s: %+v, %v, want %+v", c.way, c.file, got, err, c.want)
		}
	}
	for _, c := range [][]string{{"backwards", "b"}, {readSequential, "b", "1"}, {readRandom, "large", "1"}, {readRandom, "large", "1", "33"}, {readRandom, "gone", "1", "1"}, {readRandom, "large", "x", "1"}} {
		if _, err := prepareRead(c[0], c[1], c[2:]); err == nil {
			t.Errorf("read %q: no error", c)
		}
	}
	work, err := prepareRead(readSequential, "gone", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := work(&readOf{}); !os.IsNotExist(err) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestRandomBlocks(t *testing.T) {
	const count, all = 500, 1000
	first, err := randomBlocks(1, count, all)
	if err != nil {
		t.Fatal(err)
	}
	seen, ordered := map[int64]bool{}, 0
	for i, b := range first {
		if b < 0 || b >= all || seen[b] {
			t.Fatalf("block %d of %d, at %d", b, all, i)
		}
		seen[b] = true
		if i > 0 && b == first[i-1]+1 {
			ordered++
		}
	}
	if len(first) != count || ordered > count/10 {
		t.Errorf("%d blocks, %d of them after the one before", len(first), ordered)
	}
	again, err := randomBlocks(1, count, all)
	if err != nil || cmp.Diff(first, again) != "" {
		t.Errorf("another time other blocks: %v", err)
	}
	other, err := randomBlocks(2, count, all)
	if err != nil || cmp.Diff(first, other) == "" {
		t.Errorf("another seed the same blocks: %v", err)
	}
}

func TestLocalImages(t *testing.T) {
	pool := bytes.Repeat([]byte("package main\n"), 1<<10)
	var small, big bytes.Buffer
	if err := writeTreeOf(&small, 0, pool, 400); err != nil {
		t.Fatal(err)
	}
	if err := writeBig(&big, 300_000); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		tar   *bytes.Buffer
		files int
		sizes string // of the only file
	}{{"many", &small, 400 / len(trees), ""}, {"big", &big, 1, "300000"}} {
		files, size := 0, int64(0)
		for r := tar.NewReader(c.tar); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				files++
				size = h.Size
			}
		}
		if files != c.files || c.sizes != "" && c.sizes != strconv.FormatInt(size, 10) {
			t.Errorf("%s: %d files, the last of %d bytes", c.name, files, size)
		}
	}
}
