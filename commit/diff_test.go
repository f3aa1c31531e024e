package commit

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
)

func letters(t *testing.T, deltas []Delta) []string {
	t.Helper()
	var out []string
	for _, d := range deltas {
		out = append(out, fmt.Sprintf("%s %s", d.Kind, d.Path))
	}
	return out
}

// naiveDiff compares two trees name by name, as docker does.
func naiveDiff(old, now map[string]seen) []string {
	kinds := map[string]string{}
	isDir := func(s seen) bool { return s.mode&unix.S_IFMT == unix.S_IFDIR }
	for path, n := range now {
		o, had := old[path]
		switch {
		case !had:
			kinds[path] = "A"
		case isDir(n) && isDir(o):
			if n.mode != o.mode || n.uid != o.uid || n.gid != o.gid || n.xattrs != o.xattrs {
				kinds[path] = "C"
			}
		default:
			n.group, o.group = "", ""
			if n != o {
				kinds[path] = "C"
			}
		}
	}
	for path := range old {
		dir := filepath.Dir(path)
		if _, still := now[path]; !still && (dir == "." || isDir(now[dir])) {
			kinds[path] = "D"
		}
	}
	for path := range maps.Clone(kinds) {
		for dir := filepath.Dir(path); dir != "."; dir = filepath.Dir(dir) {
			if kinds[dir] == "" {
				kinds[dir] = "C"
			}
		}
	}
	delete(kinds, ".")
	var out []string
	for path, k := range kinds {
		out = append(out, k+" /"+path)
	}
	slices.SortFunc(out, func(a, b string) int { return strings.Compare(a[2:], b[2:]) })
	return out
}

func TestDiff(t *testing.T) {
	for _, form := range []upper.Form{upper.Trusted, upper.User} {
		for n := range uint64(2) {
			t.Run(fmt.Sprint(form, n), func(t *testing.T) {
				r := seed(t, n)
				lower := filepath.Join(scratch(t), "lower")
				fill(t, lower, r, false)
				im, _ := imageOf(t, lower)
				// In the past, so that no change goes unseen for having the same second.
				old := look(t, lower)
				merged, up := overlay(t, form, lower)
				c := changer{t: t, root: merged, r: r}
				for range 40 {
					c.change()
				}
				deltas, err := Diff(context.Background(), up, im)
				ok(t, err)
				want := naiveDiff(old, look(t, merged))
				got := letters(t, deltas)
				got, want = dropTouched(t, up, old, look(t, merged), got, want)
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("(-want +got):\n%s", d)
				}
			})
		}
	}
}

// dropTouched leaves out files that were opened for writing, or linked, and are
// what they were: only their contents tell.
func dropTouched(t *testing.T, up *upper.Dir, old, now map[string]seen, got, want []string) (g, w []string) {
	t.Helper()
	touched := map[string]bool{}
	ok(t, up.Walk(context.Background(), func(c *upper.Change) error {
		o, n := old[c.Path], now[c.Path]
		o.group, n.group = "", ""
		if !c.Whiteout && !c.IsDir() && o == n {
			touched["/"+c.Path] = true
		}
		return nil
	}))
	kept := map[string]bool{}
	for _, s := range want {
		kept[s] = true
	}
	for _, s := range got {
		path := s[2:]
		if touched[path] {
			continue
		}
		// A directory that is named for such a file alone.
		alone := s[0] == 'C' && !kept[s]
		for p := range touched {
			if alone && strings.HasPrefix(p, path+"/") {
				alone = false
				s = ""
			}
		}
		if s != "" {
			g = append(g, s)
		}
	}
	return g, want
}

func TestDiffCases(t *testing.T) {
	lower := filepath.Join(scratch(t), "lower")
	needRoot(t)
	for _, dir := range []string{"etc/apt", "usr/lib/x", "gone/sub", "replaced/sub", "empty", "linkdir", "touched", "same"} {
		ok(t, os.MkdirAll(filepath.Join(lower, dir), 0o755))
	}
	for _, file := range []string{"etc/passwd", "etc/apt/list", "gone/sub/f", "replaced/a", "replaced/b", "replaced/sub/f", "f", "g", "zero"} {
		ok(t, os.WriteFile(filepath.Join(lower, file), []byte(file), 0o644))
	}
	ok(t, os.Truncate(filepath.Join(lower, "zero"), 0))
	ok(t, os.Symlink("f", filepath.Join(lower, "link")))
	im, _ := imageOf(t, lower)
	merged, up := overlay(t, upper.Trusted, lower)
	at := func(name string) string { return filepath.Join(merged, name) }
	deltas, err := Diff(context.Background(), up, im)
	ok(t, err)
	if len(deltas) != 0 {
		t.Errorf("nothing was changed, and it says %v", deltas)
	}
	ok(t, os.WriteFile(at("etc/passwd"), []byte("new"), 0o644))
	ok(t, os.WriteFile(at("etc/apt.conf"), nil, 0o644))
	ok(t, os.RemoveAll(at("gone")))
	ok(t, os.RemoveAll(at("replaced")))
	ok(t, os.Mkdir(at("replaced"), 0o755))
	ok(t, os.WriteFile(at("replaced/a"), []byte("again"), 0o644))
	ok(t, os.Mkdir(at("replaced/sub"), 0o755))
	ok(t, os.Remove(at("f")))
	ok(t, os.Mkdir(at("f"), 0o755))
	ok(t, os.WriteFile(at("f/in"), nil, 0o644))
	ok(t, os.RemoveAll(at("usr")))
	ok(t, os.WriteFile(at("usr"), nil, 0o644))
	ok(t, os.WriteFile(at("touched/x"), nil, 0o644))
	ok(t, os.Remove(at("touched/x")))
	ok(t, os.WriteFile(at("fresh"), nil, 0o644))
	ok(t, os.Remove(at("fresh")))
	ok(t, os.Chmod(at("linkdir"), 0o700))
	// Copied up, and as they were.
	ok(t, os.Chmod(at("same"), 0o700))
	ok(t, os.Chmod(at("same"), 0o755))
	ok(t, os.Chmod(at("zero"), 0o600))
	ok(t, os.Chmod(at("zero"), 0o644))
	ok(t, unix.Setxattr(up.Tree(), upper.Trusted.OpaqueXattr(), []byte("y"), 0))
	if _, err := os.Stat(at("g")); err != nil {
		t.Errorf("overlayfs heeds a root that is opaque: %v", err)
	}
	deltas, err = Diff(context.Background(), up, im)
	ok(t, err)
	want := []string{
		"C /etc", "A /etc/apt.conf", "C /etc/passwd", "C /f", "A /f/in", "D /gone", "C /linkdir",
		"C /replaced", "C /replaced/a", "D /replaced/b", "C /replaced/sub", "D /replaced/sub/f", "C /usr",
	}
	if d := cmp.Diff(want, letters(t, deltas)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
