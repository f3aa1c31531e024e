package test

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// action is an operation with all that was drawn for it, to be done to each side.
type action struct {
	text    string                        // for the log of the run
	do      func(s *side) (string, error) // what it saw besides its error
	paths   []string                      // what to look at afterwards
	moves   []string                      // of a rename: what changes its place
	changes bool                          // names come or go
	done    func()                        // what else is to be remembered of it
}

// kinds of operations, with how often they are drawn.
var modelKinds = []struct {
	weight int
	make   func(m *model) *action
}{
	{10, (*model).create}, {10, (*model).write}, {4, (*model).truncate}, {5, (*model).fallocate}, {5, (*model).mapped},
	{7, (*model).mkdir}, {4, (*model).rmdir}, {12, (*model).rename}, {5, (*model).link}, {4, (*model).symlink}, {7, (*model).unlink},
	{5, (*model).chmod}, {5, (*model).chown}, {4, (*model).utimens}, {5, (*model).setxattr}, {3, (*model).removexattr}, {2, (*model).acl},
	{3, (*model).mknod}, {4, (*model).readdir}, {6, (*model).pread}, {5, (*model).openHandle}, {12, (*model).useHandle}, {2, (*model).removeAll},
}

func (m *model) next() *action {
	total := 0
	for _, k := range modelKinds {
		total += k.weight
	}
	for {
		n := m.rand.IntN(total)
		for _, k := range modelKinds {
			if n -= k.weight; n < 0 {
				if a := k.make(m); a != nil {
					return a
				}
				break
			}
		}
	}
}

// one draws a name that is there, or one time in ten one that may not be.
func (m *model) one() string {
	for range 20 {
		if len(m.names) == 0 || m.rand.IntN(10) == 0 {
			return m.fresh()
		}
		if p := m.names[m.rand.IntN(len(m.names))]; m.may(p) {
			return p
		}
	}
	return m.fresh()
}

// may keeps overlayfs from files of the image with several names, which it makes
// several files when it copies them up (Documentation/filesystems/overlayfs.rst, "Non-standard
// behavior").
func (m *model) may(p string) bool {
	if m.writer != "kernel" {
		return true
	}
	single := func(p string) bool { return m.base[p].links == "" || strings.HasPrefix(m.base[p].links, "1 ") }
	real, err := filepath.EvalSymlinks(m.plain.at(p)) // the way to the root has none
	return single(p) && (err != nil || single(strings.TrimPrefix(real, m.plain.root+"/")))
}

// fresh draws a name, of few, in a directory that is there.
func (m *model) fresh() string {
	names := []string{"n0", "n1", "n2", "n3", "f0", "f1", "sub", "sp ace", "日本", "x"}
	for {
		if p := path.Join(m.dirs[m.rand.IntN(len(m.dirs))], names[m.rand.IntN(len(names))]); m.may(p) && strings.Count(p, "/") < 6 {
			return p
		}
	}
}

func (m *model) dir() string { return m.dirs[m.rand.IntN(len(m.dirs))] }

func (m *model) bytes(limit int) []byte {
	b := make([]byte, m.rand.IntN(limit)+1)
	r := rand.NewChaCha8([32]byte{byte(m.rand.Uint32())})
	r.Read(b)
	return b
}

func pick[T any](m *model, of ...T) T { return of[m.rand.IntN(len(of))] }

// with opens a file for a moment. Devices are left alone: the mount has nodev.
func with(s *side, p string, flags int, mode uint32, do func(fd int) (string, error)) (string, error) {
	var st unix.Stat_t
	if unix.Stat(s.at(p), &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "not opened", nil
	}
	fd, err := unix.Open(s.at(p), flags|unix.O_CLOEXEC|unix.O_NONBLOCK, mode)
	if err != nil {
		return "", err
	}
	out, err := do(fd)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	return out, err
}

func (m *model) create() *action {
	p, b := m.fresh(), m.bytes(20_000)
	flags := unix.O_CREAT | unix.O_RDWR | pick(m, 0, unix.O_EXCL, unix.O_TRUNC, unix.O_APPEND, unix.O_NOFOLLOW)
	mode := pick[uint32](m, 0o644, 0o600, 0o777, 0o640)
	return &action{text: fmt.Sprintf("create %q flags %x mode %o, %d bytes", p, flags, mode, len(b)), paths: []string{p}, changes: true,
		do: func(s *side) (string, error) {
			return with(s, p, flags, mode, func(fd int) (string, error) {
				n, err := unix.Write(fd, b)
				return fmt.Sprint(n), err
			})
		}}
}

func (m *model) write() *action {
	p, b, off := m.one(), m.bytes(40_000), m.rand.Int64N(pick[int64](m, 1, 5000, 300_000))
	if m.rand.IntN(3) == 0 {
		return &action{text: fmt.Sprintf("append %d to %q", len(b), p), paths: []string{p}, do: func(s *side) (string, error) {
			return with(s, p, unix.O_WRONLY|unix.O_APPEND, 0, func(fd int) (string, error) {
				n, err := unix.Write(fd, b)
				return fmt.Sprint(n), err
			})
		}}
	}
	return &action{text: fmt.Sprintf("write %d at %d of %q", len(b), off, p), paths: []string{p}, do: func(s *side) (string, error) {
		return with(s, p, unix.O_WRONLY, 0, func(fd int) (string, error) {
			n, err := unix.Pwrite(fd, b, off)
			return fmt.Sprint(n), err
		})
	}}
}

func (m *model) truncate() *action {
	p, n := m.one(), m.rand.Int64N(pick[int64](m, 1, 5000, 400_000))
	if m.rand.IntN(3) == 0 {
		return &action{text: fmt.Sprintf("open %q with O_TRUNC", p), paths: []string{p}, do: func(s *side) (string, error) {
			return with(s, p, unix.O_RDWR|unix.O_TRUNC, 0, func(int) (string, error) { return "", nil })
		}}
	}
	return &action{text: fmt.Sprintf("truncate %q to %d", p, n), paths: []string{p}, do: func(s *side) (string, error) {
		// truncate(2) to the size that a file has need not touch its time. On ext4
		// it does; where the kernel keeps a plain user's times itself it does not
		// (trust_local_cmtime in fuse_do_setattr, fs/fuse/dir.c).
		var st unix.Stat_t
		if m.writer == "user" && unix.Stat(s.at(p), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == n {
			return "", nil
		}
		return "", unix.Truncate(s.at(p), n)
	}}
}

func (m *model) fallocate() *action {
	p, off, n := m.one(), m.rand.Int64N(100_000), m.rand.Int64N(100_000)+1
	mode := pick[uint32](m, 0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE)
	return &action{text: fmt.Sprintf("fallocate %q mode %x %d+%d", p, mode, off, n), paths: []string{p}, do: func(s *side) (string, error) {
		return with(s, p, unix.O_RDWR, 0, func(fd int) (string, error) { return "", unix.Fallocate(fd, mode, off, n) })
	}}
}

// mapped writes through a shared mapping, and reads through a private one.
func (m *model) mapped() *action {
	p, b, at := m.one(), m.bytes(3000), m.rand.Float64()
	return &action{text: fmt.Sprintf("write %d by mmap to %q", len(b), p), paths: []string{p}, do: func(s *side) (string, error) {
		return with(s, p, unix.O_RDWR, 0, func(fd int) (string, error) {
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size == 0 {
				return "nothing to map", err
			}
			w, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return "", err
			}
			defer unix.Munmap(w)
			copy(w[int(at*float64(len(w))):], b)
			r, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
			if err != nil {
				return "", err
			}
			defer unix.Munmap(r)
			return digestOf(r), unix.Msync(w, unix.MS_SYNC)
		})
	}}
}

func digestOf(b []byte) string { return fmt.Sprintf("%d bytes %.4x", len(b), sha256.Sum256(b)) }

func (m *model) mkdir() *action {
	p, mode := m.fresh(), pick[uint32](m, 0o755, 0o700, 0o777)
	return &action{text: fmt.Sprintf("mkdir %q %o", p, mode), paths: []string{p}, changes: true, do: func(s *side) (string, error) {
		return "", unix.Mkdir(s.at(p), mode)
	}}
}

// forget takes note that what the image has as directories is gone.
func (m *model) forget(p string) {
	for d := range m.imageDirs {
		if d == p || strings.HasPrefix(d, p+"/") {
			delete(m.imageDirs, d)
		}
	}
}

func (m *model) rmdir() *action {
	p := m.dir()
	if p == "." || m.rand.IntN(10) == 0 {
		p = m.one()
	}
	return &action{text: fmt.Sprintf("rmdir %q", p), paths: []string{p}, changes: true, done: func() { m.forget(p) }, do: func(s *side) (string, error) {
		return "", unix.Rmdir(s.at(p))
	}}
}

// removeAll empties a directory of the tree and removes it, and may make another
// in its place.
func (m *model) removeAll() *action {
	p, again := m.dir(), m.rand.IntN(2) == 0
	inside := slices.ContainsFunc(m.names, func(n string) bool { return strings.HasPrefix(n, p+"/") && !m.may(n) })
	if p == "." || inside || len(m.names) < 60 {
		return nil
	}
	return &action{text: fmt.Sprintf("remove all of %q (made again: %v)", p, again), paths: []string{p}, changes: true, done: func() { m.forget(p) }, do: func(s *side) (string, error) {
		if err := os.RemoveAll(s.at(p)); err != nil || !again {
			return "", err
		}
		return "", unix.Mkdir(s.at(p), 0o751)
	}}
}

func (m *model) rename() *action {
	from, to := m.one(), m.one()
	if m.rand.IntN(2) == 0 {
		to = m.fresh()
	}
	flags := pick[uint](m, 0, 0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE)
	if !m.may(from) || !m.may(to) || from == "." {
		return nil
	}
	moves := []string{from}
	if flags == unix.RENAME_EXCHANGE {
		moves = append(moves, to)
	}
	return &action{text: fmt.Sprintf("rename %q to %q flags %d", from, to, flags), paths: []string{from, to}, moves: moves, changes: true,
		done: func() {
			if from != to {
				m.forget(to)
				m.forget(from)
			}
		},
		do: func(s *side) (string, error) {
			return "", unix.Renameat2(unix.AT_FDCWD, s.at(from), unix.AT_FDCWD, s.at(to), flags)
		}}
}

func (m *model) link() *action {
	from, to := m.one(), m.fresh()
	if m.writer == "user" && m.typeOf(from) != unix.S_IFREG {
		return nil // fs.protected_hardlinks: special files are linked by their owner alone
	}
	return &action{text: fmt.Sprintf("link %q to %q", from, to), paths: []string{from, to}, changes: true, do: func(s *side) (string, error) {
		return "", unix.Link(s.at(from), s.at(to))
	}}
}

func (m *model) symlink() *action {
	p, to := m.fresh(), pick(m, "f0", "n1", "nowhere", strings.Repeat("long", 300))
	return &action{text: fmt.Sprintf("symlink %q to %.20q", p, to), paths: []string{p}, changes: true, do: func(s *side) (string, error) {
		return "", unix.Symlink(to, s.at(p))
	}}
}

func (m *model) unlink() *action {
	p := m.one()
	return &action{text: fmt.Sprintf("unlink %q", p), paths: []string{p}, changes: true, do: func(s *side) (string, error) {
		return "", unix.Unlink(s.at(p))
	}}
}

func (m *model) chmod() *action {
	p, mode := m.one(), pick[uint32](m, 0o644, 0o755, 0o600, 0o4755, 0o2755, 0o1777, 0)
	if m.writer == "user" {
		// A write of who is not root clears set-id bits, and in a sticky directory
		// the kernel stops who owns neither file nor directory.
		mode &= 0o777
	}
	if m.isLink(p) {
		return nil // what it leads to may be kept from us
	}
	if m.capable(p) {
		mode &= 0o1777
	}
	return &action{text: fmt.Sprintf("chmod %q %o", p, mode), paths: []string{p}, do: func(s *side) (string, error) {
		return "", unix.Chmod(s.at(p), mode)
	}}
}

// capable says whether a file has capabilities. It gets no set-ID bits besides:
// when something is written to it the kernel takes the capabilities away, and
// does not tell a FUSE filesystem that from a chown to nobody, which takes all of
// it (ATTR_KILL_PRIV in fs/fuse/dir.c).
func (m *model) capable(p string) bool {
	_, err := unix.Lgetxattr(m.plain.at(p), "security.capability", nil)
	return err == nil
}

func (m *model) isLink(p string) bool { return m.typeOf(p) == unix.S_IFLNK }

func (m *model) typeOf(p string) uint32 {
	var st unix.Stat_t
	unix.Lstat(m.plain.at(p), &st)
	return st.Mode & unix.S_IFMT
}

func (m *model) chown() *action {
	p, uid, gid := m.one(), pick(m, -1, 0, 1000, nobody, 3_000_000_000), pick(m, -1, 0, 1000, 50)
	return &action{text: fmt.Sprintf("chown %q %d:%d", p, uid, gid), paths: []string{p}, do: func(s *side) (string, error) {
		return "", unix.Lchown(s.at(p), uid, gid)
	}}
}

func (m *model) utimens() *action {
	p, ts := m.one(), unix.Timespec{Sec: m.rand.Int64N(1_600_000_000), Nsec: m.rand.Int64N(1_000_000_000)}
	if m.rand.IntN(4) == 0 {
		ts = unix.Timespec{Sec: -m.rand.Int64N(1_000_000_000)}
	}
	return &action{text: fmt.Sprintf("utimens %q %d.%09d", p, ts.Sec, ts.Nsec), paths: []string{p}, do: func(s *side) (string, error) {
		return "", unix.UtimesNanoAt(unix.AT_FDCWD, s.at(p), []unix.Timespec{{Nsec: unix.UTIME_OMIT}, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}}
}

var modelXattrs = []string{"user.one", "user.two", "user.nul", "user.of"}

func (m *model) setxattr() *action {
	p, name, value, flags := m.one(), pick(m, modelXattrs...), m.bytes(200), pick(m, 0, 0, unix.XATTR_CREATE, unix.XATTR_REPLACE)
	var st unix.Stat_t
	unix.Stat(m.plain.at(p), &st)
	if m.writer != "user" && st.Mode&0o6000 == 0 && m.rand.IntN(4) == 0 {
		name, value, flags = "security.capability", []byte(modelCapability), 0
	}
	return &action{text: fmt.Sprintf("setxattr %q %s flags %d", p, name, flags), paths: []string{p}, do: func(s *side) (string, error) {
		return "", unix.Lsetxattr(s.at(p), name, value, flags)
	}}
}

func (m *model) removexattr() *action {
	p, name := m.one(), pick(m, modelXattrs...)
	return &action{text: fmt.Sprintf("removexattr %q %s", p, name), paths: []string{p}, do: func(s *side) (string, error) {
		return "", unix.Lremovexattr(s.at(p), name)
	}}
}

// acl gives a file an access control list, or a directory one for what is made
// in it.
func (m *model) acl() *action {
	if m.writer == "user" {
		return nil // whose filesystem takes the numbers in it for this machine's
	}
	p, name := m.one(), pick(m, "system.posix_acl_access", "system.posix_acl_default")
	entry := func(tag, perm uint16, id uint32) string {
		return string([]byte{byte(tag), byte(tag >> 8), byte(perm), 0, byte(id), byte(id >> 8), byte(id >> 16), byte(id >> 24)})
	}
	none := uint32(1<<32 - 1)
	value := "\x02\x00\x00\x00" + entry(1, 7, none) + entry(2, 6, 1000) + entry(4, 5, none) + entry(16, 7, none) + entry(32, 4, none)
	if m.writer == "kernel" {
		// Overlayfs asks the image's filesystem whether it can set one, which EROFS,
		// that nobody writes, cannot (ovl_set_acl in fs/overlayfs/inode.c).
		if _, err := os.Lstat(filepath.Join(m.upper, p)); err != nil {
			return nil
		}
	}
	// Overlayfs has errors of its own for removing what is not there.
	_, err := unix.Getxattr(m.plain.at(p), name, nil)
	remove := err == nil && m.rand.IntN(3) > 0
	if m.isLink(p) {
		return nil
	}
	return &action{text: fmt.Sprintf("acl %q %s (removed: %v)", p, name, remove), paths: []string{p}, do: func(s *side) (string, error) {
		if remove {
			return "", unix.Removexattr(s.at(p), name)
		}
		return "", unix.Setxattr(s.at(p), name, []byte(value), 0)
	}}
}

func (m *model) mknod() *action {
	p, mode, dev := m.fresh(), pick[uint32](m, unix.S_IFIFO, unix.S_IFREG, unix.S_IFCHR, unix.S_IFBLK)|0o640, unix.Mkdev(7, 300)
	if m.writer == "user" && mode&unix.S_IFMT != unix.S_IFREG {
		mode = unix.S_IFIFO | 0o640 // devices are for who has CAP_MKNOD (vfs_mknod in fs/namei.c)
	}
	return &action{text: fmt.Sprintf("mknod %q %o", p, mode), paths: []string{p}, changes: true, do: func(s *side) (string, error) {
		return "", unix.Mknod(s.at(p), mode, int(dev))
	}}
}

func (m *model) readdir() *action {
	p := m.dir()
	return &action{text: fmt.Sprintf("readdir %q", p), do: func(s *side) (string, error) {
		names, err := os.ReadDir(s.at(p))
		var out []string
		for _, n := range names {
			out = append(out, fmt.Sprintf("%q %v", n.Name(), n.Type()))
		}
		if err != nil {
			err = unix.EIO
		}
		return strings.Join(out, " "), err
	}}
}

func (m *model) pread() *action {
	p, off, n := m.one(), m.rand.Int64N(100_000), m.rand.IntN(50_000)
	return &action{text: fmt.Sprintf("read %d at %d of %q", n, off, p), do: func(s *side) (string, error) {
		var st unix.Stat_t
		if err := unix.Stat(s.at(p), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fmt.Sprintf("%o", st.Mode), err
		}
		return with(s, p, unix.O_RDONLY, 0, func(fd int) (string, error) {
			b := make([]byte, n)
			n, err := unix.Pread(fd, b, off)
			return digestOf(b[:max(n, 0)]), err
		})
	}}
}
