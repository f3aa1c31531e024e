package commit

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// listTar gives what matters of each entry of a tar, in order.
func listTar(t *testing.T, b []byte) []string {
	t.Helper()
	var all []string
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return all
		}
		ok(t, err)
		name := strings.TrimPrefix(h.Name, "./")
		if name == "" {
			continue
		}
		sum := sha256.New()
		n, err := io.Copy(sum, tr)
		ok(t, err)
		s := fmt.Sprintf("%s %c %o %d:%d %d %d,%d", name, h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid, h.ModTime.Unix(), h.Devmajor, h.Devminor)
		s += fmt.Sprintf(" %d %.6x %q", n, sum.Sum(nil), strings.TrimPrefix(h.Linkname, "./"))
		if h.Typeflag != tar.TypeLink {
			for _, k := range []string{"user.a", "user.lib", "user.Z", "security.capability"} {
				s += fmt.Sprintf(" %q", h.PAXRecords[paxXattr+k])
			}
		}
		all = append(all, s)
	}
}

func TestExport(t *testing.T) {
	for n := range uint64(3) {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := seed(t, 200+n)
			lower := filepath.Join(scratch(t), "lower")
			fill(t, lower, r, true)
			im, data := imageOf(t, lower)
			merged, up := overlay(t, upper.Trusted, lower)
			c := changer{t: t, root: merged, r: r, regular: true}
			for range 60 {
				c.change()
			}
			export := func(up *upper.Dir, path string) []byte {
				var buf bytes.Buffer
				ok(t, Export(context.Background(), &buf, im, up, data, ExportOptions{Path: path}))
				return buf.Bytes()
			}
			gnu := func(dir, name string) []byte {
				return run(t, nil, "tar", "-c", "-C", dir, "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--format=posix", "--", name)
			}
			if d := cmp.Diff(listTar(t, gnu(lower, ".")), listTar(t, export(nil, ""))); d != "" {
				t.Errorf("the image alone (-tar +export):\n%s", d)
			}
			got := export(up, "")
			if d := cmp.Diff(listTar(t, gnu(merged, ".")), listTar(t, got)); d != "" {
				t.Errorf("the mount (-tar +export):\n%s", d)
			}
			if !bytes.Equal(got, export(up, "/")) {
				t.Error("it is not the same twice")
			}
			for range 5 {
				path := c.pick(false)
				rel, _ := filepath.Rel(merged, path)
				if d := cmp.Diff(listTar(t, gnu(filepath.Dir(path), filepath.Base(path))), listTar(t, export(up, rel))); d != "" {
					t.Errorf("%s alone (-tar +export):\n%s", rel, d)
				}
			}
			if err := Export(context.Background(), io.Discard, im, up, data, ExportOptions{Path: "/no/such"}); !errors.Is(err, index.ErrNotExist) {
				t.Errorf("a path that is not there: %v", err)
			}
		})
	}
}

func TestExportFaults(t *testing.T) {
	needRoot(t)
	lower := filepath.Join(scratch(t), "lower")
	ok(t, os.Mkdir(lower, 0o755))
	ok(t, os.WriteFile(filepath.Join(lower, "kept"), []byte("kept"), 0o644))
	ok(t, os.WriteFile(filepath.Join(lower, "replaced"), bytes.Repeat([]byte("x"), 1<<20), 0o644))
	im, data := imageOf(t, lower)
	up := handMade(t, upper.Trusted)
	at := func(name string) string { return filepath.Join(up.Tree(), name) }
	ok(t, os.WriteFile(at("replaced"), []byte("short"), 0o644))
	ok(t, unix.Mknod(at("sock"), unix.S_IFSOCK|0o600, 0))
	ok(t, os.WriteFile(at(".wh.x"), nil, 0o600)) // means nothing in a flat tar
	var warned []string
	var buf bytes.Buffer
	ok(t, Export(context.Background(), &buf, im, up, data, ExportOptions{Warn: func(s string) { warned = append(warned, s) }}))
	if got := listTar(t, buf.Bytes()); len(got) != 3 || len(warned) != 1 {
		t.Errorf("got %q, warned %q", got, warned)
	}
	// Asked for twice: ahead, and by who reads.
	if asked := data[0].(*file).asked.Load(); asked > 2*int64(len("kept")) {
		t.Errorf("%d bytes of the image were asked for", asked)
	}
	broken := errors.New("no registry")
	err := Export(context.Background(), io.Discard, im, up, []Data{failing{broken}}, ExportOptions{})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "/kept") {
		t.Errorf("got %v", err)
	}
	if err := Export(context.Background(), io.Discard, im, up, nil, ExportOptions{}); err == nil {
		t.Error("without data it passed")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Export(ctx, io.Discard, im, up, data, ExportOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

type failing struct{ err error }

func (f failing) Hold(int64, int64) error { return f.err }
func (f failing) Release()                {}
func (f failing) Fd() int                 { return -1 }
