package fs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"
)

// serveEnv has the test binary serve a union rather than test: who serves a mount
// must not touch it.
const serveEnv = "VARVE_TEST_UNION"

// unionTest is a union that a child serves.
type unionTest struct {
	Dir, Index, Data, Upper string
	Form                    upper.Form
	Slow                    time.Duration // of Ensure

	in  io.Writer // of the child
	out io.Reader
}

func TestMain(m *testing.M) {
	if s := os.Getenv(serveEnv); s != "" {
		if err := serveUnionTest(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// testData is a data file that is wholly here.
type testData struct {
	f    *os.File
	slow time.Duration
}

func (d testData) Hold(off, n int64) error { time.Sleep(d.slow); return nil }
func (d testData) Release()                {}
func (d testData) Fd() int                 { return int(d.f.Fd()) }
func (d testData) Size() int64             { st, _ := d.f.Stat(); return st.Size() }

func serveUnionTest(s string) error {
	var t unionTest
	if err := json.Unmarshal([]byte(s), &t); err != nil {
		return err
	}
	im, err := index.Open(t.Index)
	if err != nil {
		return err
	}
	f, err := os.Open(t.Data)
	if err != nil {
		return err
	}
	up, err := upper.Open(t.Upper)
	if err != nil {
		up, err = upper.Create(t.Upper, upper.About{Image: "test", Form: t.Form}, upper.Attr{Mode: unix.S_IFDIR | 0o755, Mtime: unix.Timespec{Sec: 1e9, Nsec: 5}})
	}
	if err != nil {
		return err
	}
	defer up.Close()
	o := Options{
		Metrics: metrics.New(nil), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Setuid: true,
		Fault: func(device int, off int64, err error) { fmt.Fprintln(os.Stderr, device, off, err) },
	}
	u, err := NewUnion(im, []Data{testData{f, t.Slow}}, up, o)
	if err != nil {
		return err
	}
	served, err := ServeUnion(t.Dir, u, o)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go holdUnionTest(u)
	<-served.Done()
	return checkUnionEnd(u)
}

// holdUnionTest holds the writers from one line on its standard input to the next.
func holdUnionTest(u *Union) {
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		release, err := u.Hold(context.Background())
		fmt.Println("held", err)
		in.ReadString('\n')
		release()
	}
}

// checkUnionEnd complains of what is left open after the end of a mount.
func checkUnionEnd(u *Union) error {
	links, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, l := range links {
		to, _ := os.Readlink("/proc/self/fd/" + l.Name())
		if strings.HasPrefix(to, u.up.Tree()+"/") || strings.HasPrefix(to, u.up.Work()+"/staging/") {
			return fmt.Errorf("descriptor %s of %s is left open", l.Name(), to)
		}
	}
	return nil
}

// lowerFile is what a test's image has.
type lowerFile struct {
	index.Entry
	content string
}

// writeLower writes an index and its one data file.
func writeLower(t testing.TB, dir string, files []lowerFile) (indexPath, dataPath string) {
	t.Helper()
	var data bytes.Buffer
	var entries []index.Entry
	for _, f := range files {
		e := f.Entry
		if e.IsRegular() {
			e.Size, e.Data = int64(len(f.content)), int64(data.Len())
			data.WriteString(f.content)
			data.Write(make([]byte, (index.BlockSize-data.Len()%index.BlockSize)%index.BlockSize))
		}
		entries = append(entries, e)
	}
	tree, err := index.Merge([][]index.Entry{entries})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tree.WriteTo(&b, []index.Device{{Tag: "test", Size: int64(data.Len())}}); err != nil {
		t.Fatal(err)
	}
	indexPath, dataPath = filepath.Join(dir, "index.erofs"), filepath.Join(dir, "data")
	for path, b := range map[string][]byte{indexPath: b.Bytes(), dataPath: data.Bytes()} {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return indexPath, dataPath
}

const testUser = 65534

// unionForms are the forms that tests run over, and the users who serve them.
var unionForms = []struct {
	form upper.Form
	uid  uint32
}{{upper.Trusted, 0}, {upper.Override, testUser}}

// newUnionTest prepares a union of files and an empty upper. Tests of mounts need
// root, and /dev/fuse.
func newUnionTest(t testing.TB, form upper.Form, uid uint32, files []lowerFile) *unionTest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts, and serves as other users")
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		t.Skip("needs " + fuseDevice)
	}
	// Not t.TempDir, whose parents other users may not enter.
	dir, err := os.MkdirTemp("/var/tmp", "varve-union")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	u := &unionTest{Dir: filepath.Join(dir, "mnt"), Upper: filepath.Join(dir, "upper"), Form: form}
	u.Index, u.Data = writeLower(t, dir, files)
	for _, path := range []string{dir, u.Dir, u.Upper} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, int(uid), int(uid)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if uid != 0 {
		st, err := os.Stat(fuseDevice)
		if err != nil || st.Mode().Perm()&0o006 != 0o006 {
			t.Skip(fuseDevice + " is closed to plain users")
		}
	}
	return u
}

// mount serves the union in a child until unmount is called, or the test ends.
func (u *unionTest) mount(t testing.TB, uid uint32) (unmount func()) {
	t.Helper()
	b, err := json.Marshal(u)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if uid != 0 {
		exe = copyBinary(t, exe, filepath.Dir(u.Dir))
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), serveEnv+"="+string(b))
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	u.out = out
	if u.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "ready\n" {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("the child says %q, %v", buf[:n], err)
	}
	done := false
	end := func() {
		if done {
			return
		}
		done = true
		if err := unbusy(unix.EBUSY, func() error { return unix.Unmount(u.Dir, 0) }); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(u.Dir, unix.MNT_DETACH)
			cmd.Process.Kill()
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child: %v", err)
		}
	}
	t.Cleanup(end)
	return end
}

// copyBinary puts the test binary where another user can run it.
func copyBinary(t testing.TB, exe, dir string) string {
	t.Helper()
	to := filepath.Join(dir, "serve")
	b, err := os.ReadFile(exe)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}
