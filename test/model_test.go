package test

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

var (
	modelSeed = flag.Uint64("seed", 0, "of the random operations in TestModel (0: from the time)")
	modelOps  = flag.Int("ops", 3000, "how many of them, for each writer")
	modelEach = flag.Bool("each", false, "look at every name after each of them, to find the one after which something differs")
	modelTail = flag.Int("tail", 40, "how many of them to show where something differs")
)

// TestModel does the same things to a writable mount and to a plain directory on
// a disk filesystem, which begins as the image unpacked, and compares what each
// answers and what has become of both; then the same of the image that is
// committed of it, and once more of one that is committed of that.
//
// Three writers: the kernel's overlayfs, the daemon's union of root, and that of
// a plain user, who may in a mount do what root does in the directory.
func TestModel(t *testing.T) {
	needRoot(t)
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for _, writer := range []string{"kernel", "fuse", "user"} {
		t.Run(writer, func(t *testing.T) {
			t.Logf("go test ./test -run TestModel/%s -seed %d -ops %d", writer, seed, *modelOps)
			runModel(t, writer, seed)
		})
	}
}

func runModel(t *testing.T, writer string, seed uint64) {
	layers := modelImage(t, writer)
	_, ref := serve(t, forms.EStargz, layers...)
	m := &model{t: t, writer: writer, rand: rand.New(rand.NewPCG(seed, 1)), start: time.Now(), overlay: writer}
	if writer == "user" {
		m.h, m.overlay = newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody}), "fuse"
	} else {
		m.h = newHost(t)
	}
	m.mount.do = m.thread()
	m.plain.do = func(f func()) { f() }
	m.plain.root = t.TempDir()
	for _, l := range layers {
		_, err := archive.Apply(t.Context(), m.plain.root, bytes.NewReader(l))
		must(t, err)
	}
	m.mount.root = m.h.ok("mount", "--rw", "--overlay", m.overlay, "--name", "one", ref)
	m.upper = filepath.Join(m.h.inspect("one").Upper, "fs")
	m.level()
	m.compare("at first")
	m.run(*modelOps * 2 / 3)
	base := m.base
	committed := m.cycle("one", base)

	// A commit of the commit.
	m.seconds = true
	m.mount.root = m.h.ok("mount", "--rw", "--overlay", m.overlay, "--name", "two", committed)
	m.upper = filepath.Join(m.h.inspect("two").Upper, "fs")
	m.levelRoot()
	m.lowered()
	m.compare("of the commit")
	m.run(*modelOps / 3)
	m.cycle("two", m.base)
	m.h.ok("umount", "-a")
}

// modelImage has all kinds of files. Times are whole seconds, as the tables of
// contents of lazy layers have them. Hard links are in one directory: overlayfs
// breaks them when it copies up, so that its writer is kept from them. What a
// plain user cannot set (capabilities) is not in the image that a plain user
// changes, whose mount loses it with the first change to the file.
func modelImage(t *testing.T, writer string) [][]byte {
	sec := int64(1_500_000_000)
	a := newLayer(t)
	add := func(l *layer, h tar.Header, content []byte) {
		if h.Typeflag != tar.TypeLink {
			sec += 1000
		}
		h.ModTime = time.Unix(sec, 0)
		l.add(h, content)
	}
	dirs := []string{"a", "a/b", "a/b/c", "d", "d/e", "empty", "gone", "gone/sub", "linked", "old", "old/sub"}
	for i, d := range dirs {
		add(a, tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: []int64{0o755, 0o750, 0o711}[i%3], Uid: i % 2 * 7}, nil)
	}
	for i, n := range []int{0, 1, 100, 4096, 70_000, 300_000} {
		for j, d := range []string{"", "a/", "a/b/", "a/b/c/", "d/", "d/e/", "old/sub/", "gone/"} {
			if (i+j)%2 == 0 {
				name := fmt.Sprintf("%sf%d", d, i)
				add(a, tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: []int64{0o644, 0o600, 0o751}[(i+j)%3], Uid: j % 3 * 1000, Gid: i}, content(name, n))
			}
		}
	}
	holes := make([]byte, 500_000)
	copy(holes[200_000:], content("holes", 10_000))
	add(a, tar.Header{Typeflag: tar.TypeReg, Name: "d/holes"}, holes)
	add(a, tar.Header{Typeflag: tar.TypeReg, Name: "linked/1", Mode: 0o640}, content("linked", 30_000))
	for _, n := range []string{"linked/2", "linked/3"} {
		add(a, tar.Header{Typeflag: tar.TypeLink, Name: n, Linkname: "linked/1", Mode: 0o640}, nil)
	}
	add(a, tar.Header{Typeflag: tar.TypeSymlink, Name: "a/s", Linkname: "f1", Mode: 0o777, Uid: 3}, nil)
	add(a, tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "d", Mode: 0o777}, nil)
	add(a, tar.Header{Typeflag: tar.TypeSymlink, Name: "d/nowhere", Linkname: "no/where", Mode: 0o777}, nil)
	add(a, tar.Header{Typeflag: tar.TypeFifo, Name: "a/fifo", Mode: 0o620, Gid: 4}, nil)
	add(a, tar.Header{Typeflag: tar.TypeChar, Name: "d/zero", Devmajor: 1, Devminor: 5, Mode: 0o666}, nil)
	add(a, tar.Header{Typeflag: tar.TypeBlock, Name: "d/disk", Devmajor: 300, Devminor: 70_000, Mode: 0o660, Gid: 6}, nil)
	add(a, tar.Header{Typeflag: tar.TypeReg, Name: "a/x", PAXRecords: xattrs("user.one", "1", "user.nul", "a\x00b")}, []byte("x"))
	add(a, tar.Header{Typeflag: tar.TypeDir, Name: "a/xd/", PAXRecords: xattrs("user.of", "a directory")}, nil)
	if writer != "user" {
		add(a, tar.Header{Typeflag: tar.TypeReg, Name: "a/capable", Mode: 0o755, PAXRecords: xattrs("security.capability", modelCapability)}, []byte("c"))
	}
	b := newLayer(t)
	for _, d := range []string{"a", "gone", "old"} {
		add(b, tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}, nil)
	}
	b.whiteout("gone/sub", "a/f2")
	b.opaque("old")
	add(b, tar.Header{Typeflag: tar.TypeReg, Name: "old/new"}, content("new", 9000))
	add(b, tar.Header{Typeflag: tar.TypeReg, Name: "gone/f1", Mode: 0o600}, content("again", 5000))
	return [][]byte{a.bytes(), b.bytes()}
}

const modelCapability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// side is one of the two trees. Everything is done to it through do, which for a
// plain user's mount is another thread.
type side struct {
	root string
	do   func(func())
	open map[int]int // descriptors by the numbers that operations give them
}

func (s *side) at(rel string) string { return filepath.Join(s.root, rel) }

// model is a run.
type model struct {
	t            *testing.T
	h            *host
	writer       string // kernel, fuse, user
	overlay      string
	upper        string // where changes go
	rand         *rand.Rand
	start        time.Time
	seconds      bool // the image is a commit, which keeps whole seconds
	mount, plain side

	base      tree            // of the image
	imageDirs map[string]bool // what the image has as directories, and nothing replaced
	names     []string        // in the tree now, without the root
	dirs      []string        // with it
	handles   []int
	count     int
	log       []string
}

// thread gives what runs a function as the user whose mount it is. A thread that
// became another user is not given back.
func (m *model) thread() func(func()) {
	if m.h.as == nil {
		return func(f func()) { f() }
	}
	work, done := make(chan func()), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		// The raw calls change this thread alone.
		for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS, 0, 0, 0}, {unix.SYS_SETRESGID, nobody, nobody, nobody}, {unix.SYS_SETRESUID, nobody, nobody, nobody}} {
			if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
				panic(errno)
			}
		}
		for f := range work {
			f()
			done <- struct{}{}
		}
	}()
	m.t.Cleanup(func() { close(work) })
	return func(f func()) { work <- f; <-done }
}

func (m *model) read(s *side) (tr tree) {
	m.t.Helper()
	s.do(func() { tr = readTree(m.t, s.root) })
	return tr
}

// level makes the plain directory, as it was unpacked, what the image says where
// who unpacked it cannot: the root, and times to the second.
func (m *model) level() {
	m.t.Helper()
	all := m.read(&m.plain)
	for p := range all {
		if n := all[p]; p != "." {
			must(m.t, unix.UtimesNanoAt(unix.AT_FDCWD, m.plain.at(p), []unix.Timespec{{Sec: n.sec}, {Sec: n.sec}}, unix.AT_SYMLINK_NOFOLLOW))
		}
	}
	m.levelRoot()
	m.lowered()
}

func (m *model) levelRoot() {
	m.t.Helper()
	var root node
	m.mount.do(func() { root, _, _ = readNode(m.mount.root) })
	must(m.t, os.Chmod(m.plain.root, fs.FileMode(root.mode&0o777)))
	must(m.t, unix.UtimesNanoAt(unix.AT_FDCWD, m.plain.root, []unix.Timespec{{Sec: root.sec}, {Sec: root.sec, Nsec: root.nsec}}, 0))
}

// lowered takes note that an image has what the mount shows now.
func (m *model) lowered() {
	m.t.Helper()
	m.base = m.read(&m.mount)
	m.imageDirs = map[string]bool{}
	for p, n := range m.base {
		if n.mode&unix.S_IFMT == unix.S_IFDIR {
			m.imageDirs[p] = true
		}
	}
	m.mount.open, m.plain.open = map[int]int{}, map[int]int{}
	m.look()
}

// look lists the names of the tree, which both sides have alike.
func (m *model) look() {
	m.t.Helper()
	m.names, m.dirs = m.names[:0], append(m.dirs[:0], ".")
	must(m.t, filepath.WalkDir(m.plain.root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == m.plain.root {
			return err
		}
		rel := p[len(m.plain.root)+1:]
		m.names = append(m.names, rel)
		if d.IsDir() {
			m.dirs = append(m.dirs, rel)
		}
		return nil
	}))
}

// compare reads both trees whole.
func (m *model) compare(what string) {
	m.t.Helper()
	want, got := m.read(&m.plain), m.read(&m.mount)
	sameTree(m.t, m.alike(want, got), m.secondsOf(got))
	m.check(what)
}

func (m *model) secondsOf(tr tree) tree {
	if m.seconds {
		return tr.wholeSeconds()
	}
	return tr
}

// alike gives want with the times of got where both are of this run and near one
// another: what is done to one side is done to the other a moment later.
func (m *model) alike(want, got tree) tree {
	want = m.secondsOf(want)
	out := tree{}
	for p, w := range want {
		if g, ok := got[p]; ok && w.sec >= m.start.Unix()-1 && g.sec >= m.start.Unix()-1 && max(w.sec-g.sec, g.sec-w.sec) < 30 {
			w.sec, w.nsec = g.sec, g.nsec
			if m.seconds {
				w.nsec = 0
			}
		}
		out[p] = w
	}
	return out
}

// check ends the run where something differed, and says what was done before.
func (m *model) check(what string) {
	m.t.Helper()
	if m.t.Failed() {
		m.t.Fatalf("%s: after %d operations, the last of them:\n%s", what, m.count, strings.Join(m.log[max(0, len(m.log)-*modelTail):], "\n"))
	}
}

// run does n random operations.
func (m *model) run(n int) {
	m.t.Helper()
	for i := range n {
		m.step()
		if i%400 == 399 {
			m.compare("at a checkpoint")
		}
	}
	m.closeAll()
	m.compare("at the end")
}

// step does one operation to both sides.
func (m *model) step() {
	m.t.Helper()
	a := m.next()
	m.count++
	var got, want string
	var gerr, werr error
	m.mount.do(func() { got, gerr = a.do(&m.mount) })
	if gerr == unix.EXDEV && a.moves != nil {
		if !slices.ContainsFunc(a.moves, func(p string) bool { return m.imageDirs[p] }) {
			m.t.Errorf("%s: EXDEV, though nothing of it is a directory of the image", a.text)
		}
		m.log = append(m.log, a.text+": EXDEV")
		m.check("rename")
		return
	}
	m.plain.do(func() { want, werr = a.do(&m.plain) })
	m.log = append(m.log, fmt.Sprintf("%s: %s%s", a.text, got, errText(gerr)))
	if gerr != werr || got != want {
		m.t.Errorf("%s: got %s%s, want %s%s", a.text, got, errText(gerr), want, errText(werr))
	}
	if gerr == nil && a.done != nil {
		a.done()
	}
	if werr == nil && a.changes {
		m.look()
	}
	if *modelEach {
		a.paths = m.names
	}
	for _, p := range a.paths {
		m.sameStat(a.text, p)
	}
	m.check("operation")
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(" [%v]", err)
}

// sameStat compares what stat(2) says of a name.
func (m *model) sameStat(what, p string) {
	m.t.Helper()
	stat := func(s *side) (out string) {
		s.do(func() {
			var st unix.Stat_t
			if err := unix.Lstat(s.at(p), &st); err != nil {
				out = err.Error()
				return
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				st.Size, st.Nlink = 0, 0
			}
			out = fmt.Sprintf("mode %o owner %d:%d size %d links %d device %x", st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Rdev)
		})
		return out
	}
	if got, want := stat(&m.mount), stat(&m.plain); got != want {
		m.t.Errorf("%s: %q has %s, want %s", what, p, got, want)
	}
}

// cycle commits, unmounts and mounts again, asks for the differences, commits
// again, which must give the same, and mounts what was committed: all must show
// the same tree. It leaves the mount unmounted and gives the commit's digest.
func (m *model) cycle(name string, base tree) string {
	m.t.Helper()
	h := m.h
	commit := func() string { return h.ok("commit", "--source-date-epoch", "1700000000", "-m", "the model", name) }
	early := commit()
	h.ok("umount", name)
	m.mount.root = h.ok("mount", "--name", name)
	m.compare("mounted again")
	tr := m.read(&m.mount)
	m.sameDiff(name, base, tr)
	digest := commit()
	if digest != early {
		m.t.Errorf("the commit was %s before it was mounted again, now %s", early, digest)
	}
	h.ok("umount", name)
	for _, face := range faces {
		if face == "kernel" && h.as != nil {
			continue
		}
		dir := h.ok("mount", "--wait", "--face", face, "--name", "committed-"+face, digest)
		var got tree
		m.mount.do(func() { got = readTree(m.t, dir) })
		root := tr["."] // whose time alone is no reason to be in a layer
		root.sec = got["."].sec
		tr["."] = root
		sameTree(m.t, tr.wholeSeconds(), got)
		m.check("the commit, face " + face)
		h.ok("umount", dir)
	}
	return digest
}
