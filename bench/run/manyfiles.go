package main

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/daemon"
)

// The image of many small files, made here and kept in the registry.
const (
	manyFiles       = "manyfiles"
	manyFilesCount  = 100_000 // regular files, in as many layers as there are trees
	manyFilesMedian = 600     // bytes of a file
	manyFilesSpread = 1.2     // sigma
)

// trees are what the layers look like: where packages lie, what their directories
// and files are called, and how many files a directory has on average.
var trees = []struct {
	root        string
	dirs, files []string
	ends        []string
	perDir      int
}{
	{"usr/lib/node_modules", []string{"lib", "dist", "src", "test", "esm", "cjs", "internal", "helpers"},
		[]string{"index", "parse", "stringify", "createReadStream", "isPlainObject", "utils", "constants", "baseIteratee", "validate", "errors"},
		[]string{".js", ".js", ".js", ".d.ts", ".js.map", ".json"}, 24},
	{"usr/lib/python3/dist-packages", []string{"core", "tests", "_internal", "backends", "io", "compat", "models", "locale"},
		[]string{"__init__", "test_frame", "_version", "base", "exceptions", "decorators", "utils", "serializers", "admin_views", "base_parser"},
		[]string{".py", ".py", ".pyi", ".cpython-311.pyc", ".txt"}, 36},
}

// haveManyFiles makes sure that the registry holds the image of many files, and
// pushes its indexes.
func (b *bench) haveManyFiles(ctx context.Context) (*daemon.Indexed, error) {
	repo := repoIndexed + manyFiles
	ref, err := b.reference(repo, tagPlain)
	if err != nil {
		return nil, err
	}
	if _, err := remote.Head(ref, remote.WithContext(ctx)); err != nil {
		dir, err := os.MkdirTemp(b.dir, "manyfiles-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		pool, err := sourceText(ctx)
		if err != nil {
			return nil, err
		}
		var layers []forms.Opener
		for i := range trees {
			layers = append(layers, func() (io.ReadCloser, error) {
				r, w := io.Pipe()
				go func() { w.CloseWithError(writeTree(w, i, pool)) }() // ends with r
				return r, nil
			})
		}
		img, err := forms.FromLayers(ctx, forms.Gzip, forms.Options{Dir: dir}, layers...)
		if err != nil {
			return nil, err
		}
		if err := forms.Push(ctx, img, ref.String()); err != nil {
			return nil, err
		}
	}
	return b.indexed(ctx, repo)
}

// writeTree writes the tar of layer i, the same every time.
func writeTree(w io.Writer, i int, pool []byte) error {
	return writeTreeOf(w, i, pool, manyFilesCount)
}

// writeTreeOf is writeTree with another number of files in all layers together.
func writeTreeOf(w io.Writer, i int, pool []byte, count int) error {
	t := trees[i]
	r := rand.New(rand.NewPCG(commitSeed, uint64(i)))
	out := tar.NewWriter(w)
	at := time.Unix(1_700_000_000, 0)
	made := map[string]bool{}
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if dir == "." || made[dir] {
			return nil
		}
		made[dir] = true
		if err := mkdir(path.Dir(dir)); err != nil {
			return err
		}
		return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: at})
	}
	pick := func(from []string) string { return from[r.IntN(len(from))] }
	dir, names := "", map[string]bool{}
	var text []byte
	for n := 0; n < count/len(trees); {
		if dir == "" || r.IntN(t.perDir) == 0 {
			// A package now and then, most often one more directory of the last.
			dir = path.Join(t.root, fmt.Sprintf("%s-%s-%d", pick(t.files), pick(t.dirs), n/(10*t.perDir)), pick(t.dirs), pick(t.dirs))
			if made[dir] {
				dir += fmt.Sprint(n)
			}
			names = map[string]bool{}
			if err := mkdir(dir); err != nil {
				return err
			}
		}
		name := pick(t.files) + pick(t.ends)
		for names[name] {
			name = fmt.Sprintf("%s_%d%s", pick(t.files), r.IntN(1000), pick(t.ends))
		}
		names[name] = true
		size := min(int(manyFilesMedian*math.Exp(manyFilesSpread*r.NormFloat64())), 1<<20)
		text = appendText(text[:0], r, pool, size)
		h := tar.Header{Typeflag: tar.TypeReg, Name: path.Join(dir, name), Mode: 0o644, Size: int64(size), ModTime: at.Add(time.Duration(r.IntN(1e6)) * time.Second)}
		if err := out.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := out.Write(text); err != nil {
			return err
		}
		n++
	}
	return out.Close()
}
