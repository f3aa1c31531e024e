package fs

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// compare compares the two trees.
func (m *model) compare() {
	m.t.Helper()
	if diff := cmp.Diff(m.describe(m.dirs[1]), m.describe(m.dirs[0])); diff != "" {
		m.t.Errorf("the trees differ (-plain +union):\n%s", diff)
	}
}

// describe tells all that can be known of a tree, but for what must differ.
func (m *model) describe(root string) map[string]string {
	all := map[string]string{}
	first := map[uint64]string{} // hard links by the first of their names
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		all[rel] = m.describeOne(path, rel, d, first)
		return nil
	})
	if err != nil {
		m.t.Error(err)
	}
	return all
}

func (m *model) describeOne(path, rel string, d fs.DirEntry, first map[uint64]string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err.Error()
	}
	var b strings.Builder
	if m.loose {
		st.Nlink, st.Ino = 0, 0
	}
	fmt.Fprintf(&b, "mode %o, %d links, dirent %v", st.Mode, st.Nlink, d.Type())
	if m.owners {
		fmt.Fprintf(&b, ", owner %d:%d", st.Uid, st.Gid)
	}
	if st.Mtim.Sec < 1.1e9 { // set; what was set by writing is about now
		fmt.Fprintf(&b, ", mtime %d.%d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if first[st.Ino] == "" && !m.loose {
			first[st.Ino] = rel
		}
		fmt.Fprintf(&b, ", size %d, first name %s", st.Size, first[st.Ino])
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		content, err := os.ReadFile(path)
		fmt.Fprintf(&b, ", content %q %v", content, err)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		fmt.Fprintf(&b, ", target %q %v", target, err)
	}
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	names := strings.Split(strings.TrimSuffix(string(buf[:max(n, 0)]), "\x00"), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if strings.HasPrefix(name, "user.") {
			k, err := unix.Lgetxattr(path, name, buf)
			fmt.Fprintf(&b, ", %s=%q %v", name, buf[:max(k, 0)], err)
		} else if name != "" {
			fmt.Fprintf(&b, ", %s", name)
		}
	}
	if err != nil {
		fmt.Fprintf(&b, ", %v", err)
	}
	return b.String()
}
