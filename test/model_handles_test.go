package test

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// openHandle keeps a file open, whatever becomes of its name. Overlayfs goes on
// showing the image's file to who had that open for reading when it was copied up
// (overlayfs.rst, "Non-standard behavior").
func (m *model) openHandle() *action {
	if len(m.handles) >= 8 {
		return nil
	}
	p, n := m.one(), m.count
	flags := pick(m, unix.O_RDWR, unix.O_RDWR|unix.O_APPEND, unix.O_RDONLY)
	if m.writer == "kernel" && flags == unix.O_RDONLY {
		flags = unix.O_RDWR
	}
	var st unix.Stat_t
	if unix.Stat(m.plain.at(p), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	return &action{text: fmt.Sprintf("open %q as %d flags %x", p, n, flags), paths: []string{p}, done: func() { m.handles = append(m.handles, n) }, do: func(s *side) (string, error) {
		fd, err := unix.Open(s.at(p), flags|unix.O_CLOEXEC, 0)
		if err == nil {
			s.open[n] = fd
		}
		return "", err
	}}
}

func (m *model) useHandle() *action {
	if len(m.handles) == 0 {
		return nil
	}
	i := m.rand.IntN(len(m.handles))
	n := m.handles[i]
	b, off, size := m.bytes(20_000), m.rand.Int64N(100_000), m.rand.Int64N(200_000)
	a := &action{}
	what := pick(m, "read", "read", "write", "write", "truncate", "stat", "chmod", "fsync", "xattr", "punch", "close")
	a.text = fmt.Sprintf("%s open file %d", what, n)
	use := map[string]func(fd int) (string, error){
		"read": func(fd int) (string, error) {
			b := make([]byte, size)
			k, err := unix.Pread(fd, b, off)
			return digestOf(b[:max(k, 0)]), err
		},
		"write": func(fd int) (string, error) {
			k, err := unix.Pwrite(fd, b, off)
			return fmt.Sprint(k), err
		},
		"truncate": func(fd int) (string, error) { return "", unix.Ftruncate(fd, size) },
		"stat": func(fd int) (string, error) {
			var st unix.Stat_t
			err := unix.Fstat(fd, &st)
			return fmt.Sprintf("mode %o owner %d:%d size %d links %d", st.Mode, st.Uid, st.Gid, st.Size, st.Nlink), err
		},
		"chmod": func(fd int) (string, error) { return "", unix.Fchmod(fd, uint32(0o600|size&0o77)) },
		"fsync": func(fd int) (string, error) { return "", unix.Fsync(fd) },
		"xattr": func(fd int) (string, error) { return "", unix.Fsetxattr(fd, "user.one", b[:min(50, len(b))], 0) },
		"punch": func(fd int) (string, error) {
			return "", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size+1)
		},
		"close": unixClose,
	}[what]
	a.do = func(s *side) (string, error) { return use(s.open[n]) }
	if what == "close" {
		a.done = func() { m.handles = slices.Delete(m.handles, i, i+1) }
	}
	return a
}

func unixClose(fd int) (string, error) { return "", unix.Close(fd) }

func (m *model) closeAll() {
	for _, s := range []*side{&m.mount, &m.plain} {
		s.do(func() {
			for _, n := range m.handles {
				unix.Close(s.open[n])
			}
		})
	}
	m.handles = nil
}
