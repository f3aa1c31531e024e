package test

import (
	"archive/tar"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

// asUser runs a command as the user whose host this is.
func (h *host) asUser(name string, args ...string) result {
	h.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = h.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	cmd.Dir = "/"
	return finish(h.t, cmd, append([]string{name}, args...))
}

// script runs a shell script as that user, which must succeed, and gives what it
// printed.
func (h *host) script(dir, text string) string {
	h.t.Helper()
	r := h.asUser("sh", "-euc", "cd '"+dir+"'\n"+text)
	if r.code != 0 || r.err != "" {
		h.t.Fatalf("%s: exit %d: %s%s", text, r.code, r.out, r.err)
	}
	return r.out
}

// newUser makes a host of a plain user's.
func newUser(t *testing.T) *host {
	t.Helper()
	needRoot(t) // to become another user
	_, err := exec.LookPath("fusermount3")
	need(t, err == nil, "fusermount3")
	st, err := os.Stat("/dev/fuse")
	must(t, err)
	need(t, st.Mode().Perm()&0o006 == 0o006, "a /dev/fuse for everyone")
	return newHostAs(t, &syscall.Credential{Uid: nobody, Gid: nobody})
}

// userImage has what a plain user could not unpack.
func userImage(t *testing.T) []byte {
	l := newLayer(t)
	l.dir("etc", "bin", "home")
	l.file("etc/hostname", []byte("varve\n"))
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/shadow", Mode: 0o640, Gid: 42}, []byte("secret\n"))
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/su", Mode: 0o4755}, content("su", 20_000))
	l.add(tar.Header{Typeflag: tar.TypeDir, Name: "home/user/", Mode: 0o700, Uid: 1000, Gid: 1000}, nil)
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "home/user/file", Mode: 0o400, Uid: 1000, Gid: 1000}, content("home", 5000))
	l.add(tar.Header{Typeflag: tar.TypeSymlink, Name: "etc/link", Linkname: "hostname", Mode: 0o777, Uid: 7}, nil)
	l.add(tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666}, nil)
	return l.bytes()
}

const userStat = `stat -c '%n|%F|%a|%u:%g|%h' `

// TestPlainUserWrites changes an image as a user without privilege, who in the
// mount may do what root may in the image.
func TestPlainUserWrites(t *testing.T) {
	h := newUser(t)
	_, ref := serve(t, forms.EStargz, userImage(t))
	h.fails(1, "mount", "--rw", "--overlay", "kernel", ref)
	dir := h.ok("mount", "--rw", "--name", "n", ref)
	if m := h.inspect("n"); m.Overlay != "fuse" || !strings.Contains(m.OverlayReason, "plain user") || m.Face != "fuse" {
		t.Errorf("inspect: %q %q face %s", m.Overlay, m.OverlayReason, m.Face)
	}
	h.script(dir, `
umask 022
echo new > new; mkdir dir; echo x > dir/file; ln dir/file dir/second
ln -s new link; mkfifo fifo
echo one > owned; chown 1000:100 owned; chmod 4755 owned
chown 33:33 dir; chmod 1777 dir
chmod 0 new
mkdir shut; echo in > shut/file; chmod 0 shut
chown -h 5:6 link; chown 5:6 fifo; chmod 620 fifo
chown 0:42 etc/hostname; chmod 640 etc/hostname
echo more >> etc/shadow
echo mine >> home/user/file
chown -h 9:9 etc/link
chmod 600 null; chown 8:8 null
rm bin/su
setfattr -n user.k -v value owned
touch -d @1234567890 owned dir link
`)
	look := userStat + `new dir dir/file dir/second link fifo owned shut etc/hostname etc/shadow home/user/file etc/link null
cat new dir/second shut/file etc/shadow link
readlink link etc/link
getfattr --only-values -n user.k owned; echo
getfattr -d -m - new owned | grep -c containers || true
stat -c %Y owned dir; ls bin`
	want := `new|regular file|0|0:0|1
dir|directory|1777|33:33|2
dir/file|regular file|644|0:0|2
dir/second|regular file|644|0:0|2
link|symbolic link|777|5:6|1
fifo|fifo|620|5:6|1
owned|regular file|4755|1000:100|1
shut|directory|0|0:0|2
etc/hostname|regular file|640|0:42|1
etc/shadow|regular file|640|0:42|1
home/user/file|regular file|400|1000:1000|1
etc/link|symbolic link|777|9:9|1
null|character special file|600|8:8|1
new
x
in
secret
more
new
new
hostname
value
0
1234567890
1234567890
`
	shown := func(when string) {
		t.Helper()
		if got := h.script(dir, look); got != want {
			t.Errorf("%s:\n%s\nwant\n%s", when, got, want)
		}
	}
	shown("as it was written")
	h.ok("umount", "n")
	h.ok("mount", "--name", "n")
	shown("mounted again")
	h.script(dir, "sync -f .")
	h.kill()
	h.ok("ps")
	shown("after a kill")

	// On disk everything is the user's own, and a mark says the rest.
	upper := filepath.Join(h.inspect("n").Upper, "fs")
	must(t, filepath.WalkDir(upper, func(p string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(p, &st)
		}
		if err == nil && st.Uid != nobody {
			t.Errorf("%s is %d's with mode %o", p, st.Uid, st.Mode)
		}
		return err
	}))

	digest := h.ok("commit", "n", "localhost/test/committed:1")
	h.ok("umount", "n")
	entries := h.lastLayer(digest)
	for name, w := range map[string]tar.Header{
		"new":            {Typeflag: tar.TypeReg, Mode: 0},
		"dir":            {Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 33, Gid: 33},
		"dir/file":       {Typeflag: tar.TypeReg, Mode: 0o644},
		"dir/second":     {Typeflag: tar.TypeLink, Mode: 0o644, Linkname: "dir/file"},
		"link":           {Typeflag: tar.TypeSymlink, Mode: 0o777, Uid: 5, Gid: 6, Linkname: "new"},
		"fifo":           {Typeflag: tar.TypeFifo, Mode: 0o620, Uid: 5, Gid: 6},
		"owned":          {Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 1000, Gid: 100},
		"shut":           {Typeflag: tar.TypeDir, Mode: 0},
		"shut/file":      {Typeflag: tar.TypeReg, Mode: 0o644},
		"etc/hostname":   {Typeflag: tar.TypeReg, Mode: 0o640, Gid: 42},
		"etc/shadow":     {Typeflag: tar.TypeReg, Mode: 0o640, Gid: 42},
		"home/user":      {Typeflag: tar.TypeDir, Mode: 0o700, Uid: 1000, Gid: 1000},
		"home/user/file": {Typeflag: tar.TypeReg, Mode: 0o400, Uid: 1000, Gid: 1000},
		"etc/link":       {Typeflag: tar.TypeSymlink, Mode: 0o777, Uid: 9, Gid: 9, Linkname: "hostname"},
		"null":           {Typeflag: tar.TypeChar, Mode: 0o600, Uid: 8, Gid: 8, Devmajor: 1, Devminor: 3},
		"bin/.wh.su":     {Typeflag: tar.TypeReg},
	} {
		e, ok := entries[name]
		g := e.header
		if !ok || g.Typeflag != w.Typeflag || g.Mode != w.Mode || g.Uid != w.Uid || g.Gid != w.Gid || g.Linkname != w.Linkname || g.Devmajor != w.Devmajor || g.Devminor != w.Devminor {
			t.Errorf("the layer has %s as %c mode %o owner %d:%d link %q: want %+v", name, g.Typeflag, g.Mode, g.Uid, g.Gid, g.Linkname, w)
		}
	}
	if x := entries["owned"].header.PAXRecords; x["SCHILY.xattr.user.k"] != "value" || strings.Contains(strings.Join(keys(x), " "), "containers") {
		t.Errorf("extended attributes in the layer: %q", x)
	}

	// The commit is mounted, and changed again.
	dir = h.ok("mount", "--rw", "--name", "n2", digest)
	shown("of the commit")
	h.script(dir, "chown 77:77 owned; chmod 700 shut")
	if got := h.script(dir, userStat+"owned shut"); got != "owned|regular file|755|77:77|1\nshut|directory|700|0:0|2\n" {
		t.Errorf("of the commit, changed: %s", got)
	}
	h.ok("umount", "-a")
	h.ok("prune", "-f")
	if n := h.uppers(); n != 0 {
		t.Errorf("%d uppers are left", n)
	}
}

// lastLayer reads the newest layer of an image from the host's own store.
func (h *host) lastLayer(digest string) map[string]tarEntry {
	h.t.Helper()
	h.ok("mount", "--wait", "--name", "looked-at", digest)
	layers := h.inspect("looked-at").Layers
	h.ok("umount", "looked-at")
	_, hex, _ := strings.Cut(layers[len(layers)-1].Digest, ":")
	f, err := os.Open(filepath.Join(h.root, "state/images/blobs/sha256", hex))
	must(h.t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(h.t, err)
	b, err := io.ReadAll(z)
	must(h.t, err)
	return tarOf(h.t, string(b))
}

// TestPlainUserRemoves deletes uppers in which directories are shut even to their
// owner.
func TestPlainUserRemoves(t *testing.T) {
	h := newUser(t)
	_, ref := serve(t, forms.EStargz, userImage(t))
	for _, verb := range [][]string{{"rm", "n"}, {"prune", "-f"}, {"rm", "-f", "n"}, {"umount", "--rm", "n"}} {
		dir := h.ok("mount", "--rw", "--name", "n", ref)
		h.script(dir, "mkdir -p a/b/c; echo x > a/b/c/file; chmod 0 a/b/c/file a/b/c a/b a; chmod 0 home/user")
		upper := h.inspect("n").Upper
		mounted := verb[0] == "umount" || verb[1] == "-f" && verb[0] == "rm"
		if !mounted {
			h.ok("umount", "n")
			// Shut on disk as well.
			h.script(upper+"/fs", "chmod 0 a/b/c; chmod 500 a/b; chmod 0 a")
		}
		h.ok(verb...)
		missing(t, upper)
		if n := h.uppers(); n != 0 {
			t.Fatalf("%v: %d uppers are left", verb, n)
		}
	}
}

// TestUserNamespace mounts as root of a user namespace, where the kernel lets its
// overlayfs be mounted.
func TestUserNamespace(t *testing.T) {
	h := newUser(t)
	_, ref := serve(t, forms.EStargz, userImage(t))
	_, err := exec.LookPath("unshare")
	need(t, err == nil, "unshare(1)")
	r := h.asUser("unshare", "-Urm", "true")
	need(t, r.code == 0, "user namespaces for plain users")
	// Owners are real in this form, as far as the namespace maps them: of the image
	// root alone.
	script := `
set -eu
dir=$($varve mount --rw --name n $ref)
trap '$varve daemon stop' EXIT
$varve inspect -f '{{.Overlay}}|{{.OverlayReason}}|{{.RW}}' n
stat -f -c %T "$dir"
cd "$dir"
echo new > new; mkdir dir; echo x > dir/file; chmod 751 dir; echo more >> etc/hostname; rm bin/su; rmdir bin; mkdir bin; mkfifo fifo; ln -s new link
` + userStat + `new dir dir/file etc/hostname bin fifo link
cat etc/hostname link
ls bin
cd /
$varve umount n
$varve diff n
$varve mount --name n >/dev/null
cat "$dir/etc/hostname"
digest=$($varve commit n)
$varve umount n
$varve daemon stop
trap - EXIT
c=$($varve mount --name c $digest)
trap '$varve daemon stop' EXIT
cd "$c"
` + userStat + `new dir dir/file etc/hostname bin fifo link
cat etc/hostname
cd /
$varve umount c
$varve rm n
`
	cmd := exec.Command("unshare", "-Urm", "sh", "-c", script)
	cmd.Env = append(h.env, "varve="+varve, "ref="+ref)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.as}
	cmd.Dir = "/"
	r = finish(t, cmd, []string{"in a user namespace"})
	stats := `new|regular file|644|0:0|1
dir|directory|751|0:0|DIR
dir/file|regular file|644|0:0|1
etc/hostname|regular file|644|0:0|1
bin|directory|755|0:0|DIR
fifo|fifo|644|0:0|1
link|symbolic link|777|0:0|1
`
	want := `kernel|the kernel mounts overlayfs in this user namespace|true
overlayfs
` + stats + `varve
more
new
n
C /bin
D /bin/su
A /dir
A /dir/file
C /etc
C /etc/hostname
A /fifo
A /link
A /new
varve
more
n
` + stats + `varve
more
c
n
`
	got := strings.NewReplacer("751|0:0|1\n", "751|0:0|DIR\n", "751|0:0|2\n", "751|0:0|DIR\n", "directory|755|0:0|1\n", "directory|755|0:0|DIR\n", "directory|755|0:0|2\n", "directory|755|0:0|DIR\n").Replace(r.out)
	if r.code != 0 || got != want {
		t.Errorf("exit %d:\n%s\nwant\n%s\nstderr: %s", r.code, got, want, r.err)
	}
	if n := h.uppers(); n != 0 {
		t.Errorf("%d uppers are left", n)
	}
}
