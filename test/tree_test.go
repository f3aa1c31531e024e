package test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// node is all that can be seen of a file. What a filesystem chooses for itself
// (inode numbers, blocks, sizes and links of directories) is left out.
type node struct {
	mode, uid, gid uint32
	rdev           uint64
	sec, nsec      int64
	size           int64
	links          string // the first name of its set and how many it has
	target         string
	sum            string
	xattrs         string
}

// tree is a directory's names with all that is below it, by path from the root.
type tree map[string]node

func readTree(t *testing.T, root string) tree {
	t.Helper()
	out := tree{}
	first := map[uint64]string{}
	var walk func(rel string)
	walk = func(rel string) {
		n, st, err := readNode(filepath.Join(root, rel))
		if err != nil {
			t.Errorf("%q: %v", rel, err)
			return
		}
		if n.mode&unix.S_IFMT != unix.S_IFDIR {
			if _, ok := first[st.Ino]; !ok {
				first[st.Ino] = rel
			}
			n.links = fmt.Sprintf("%d of %q", st.Nlink, first[st.Ino])
			out[rel] = n
			return
		}
		out[rel] = n
		names, err := os.ReadDir(filepath.Join(root, rel)) // sorted, so that first is the same everywhere
		if err != nil {
			t.Errorf("%q: %v", rel, err)
		}
		for _, d := range names {
			walk(path.Join(rel, d.Name()))
		}
	}
	walk(".")
	return out
}

func readNode(p string) (n node, st unix.Stat_t, err error) {
	if err := unix.Lstat(p, &st); err != nil {
		return n, st, err
	}
	n = node{mode: st.Mode, uid: st.Uid, gid: st.Gid, sec: st.Mtim.Sec, nsec: st.Mtim.Nsec}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.size = st.Size
		n.sum, err = sumFile(p)
	case unix.S_IFLNK:
		n.size = st.Size
		n.target, err = os.Readlink(p)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.rdev = st.Rdev
	}
	if err == nil {
		n.xattrs, err = readXattrs(p)
	}
	return n, st, err
}

func sumFile(p string) (string, error) {
	f, err := os.Open(p)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

// readXattrs gives names and values in the order of the names.
func readXattrs(p string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if errors.Is(err, unix.ENOTSUP) { // FUSE has no other word for an image without any
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("llistxattr: %w", err)
	}
	var all []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return "", fmt.Errorf("lgetxattr %s: %w", name, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// wholeSeconds cuts times as old forms of tar do.
func (tr tree) wholeSeconds() tree {
	return tr.each(func(n *node) { n.nsec = 0 })
}

// roundSeconds rounds times as the tables of contents of eStargz do.
func (tr tree) roundSeconds() tree {
	return tr.each(func(n *node) {
		if n.nsec >= 5e8 {
			n.sec++
		}
		n.nsec = 0
	})
}

func (tr tree) each(change func(*node)) tree {
	out := tree{}
	for p, n := range tr {
		change(&n)
		out[p] = n
	}
	return out
}

// sameTree compares what was wanted with what was mounted.
func sameTree(t *testing.T, want, got tree) {
	t.Helper()
	var bad []string
	for p, w := range want {
		if g, ok := got[p]; !ok {
			bad = append(bad, fmt.Sprintf("%q is missing", p))
		} else if g != w {
			bad = append(bad, fmt.Sprintf("%q:\n\twant %+v\n\tgot  %+v", p, w, g))
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			bad = append(bad, fmt.Sprintf("%q is too much", p))
		}
	}
	slices.Sort(bad)
	for i, b := range bad {
		if i == 5 {
			t.Errorf("and %d more", len(bad)-i)
			break
		}
		t.Error(b)
	}
}

func sumOf(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// namesIn lists a directory.
func namesIn(t *testing.T, dir string) string {
	t.Helper()
	es, err := os.ReadDir(dir)
	must(t, err)
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// lists waits until a directory of which something still passes has these names.
func lists(t *testing.T, dir, want string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		got := namesIn(t, dir)
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Errorf("names that have passed: %s, want %s", got, want)
			return
		}
	}
}
