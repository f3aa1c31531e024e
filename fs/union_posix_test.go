package fs

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// insideEnv names the directory that the tests below [TestInside] work in.
const insideEnv = "VARVE_TEST_INSIDE"

// inside runs a test of this package as another user, who is the only one that
// FUSE lets into a mount of that user's.
func inside(t *testing.T, u *unionTest, uid uint32, test string, env ...string) {
	t.Helper()
	exe := filepath.Join(filepath.Dir(u.Dir), "serve")
	if uid == 0 {
		var err error
		if exe, err = os.Executable(); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"-test.run=^TestInside$/^" + test + "$"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(append(os.Environ(), insideEnv+"="+u.Dir), env...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if err != nil || testing.Verbose() {
		t.Logf("%s", strings.TrimSpace(string(out)))
	}
	if err != nil {
		t.Errorf("as user %d: %v", uid, err)
	}
}

func TestInside(t *testing.T) {
	dir := os.Getenv(insideEnv)
	if dir == "" {
		return // other tests run this one in a mount
	}
	t.Run("posix", func(t *testing.T) { testPosix(t, dir) })
	t.Run("semantics", func(t *testing.T) { testSemantics(t, dir) })
	t.Run("model", func(t *testing.T) { testModel(t, dir) })
}

func TestUnionPosix(t *testing.T) {
	for _, f := range unionForms {
		t.Run(string(f.form), func(t *testing.T) {
			u := newUnionTest(t, f.form, f.uid, nil)
			u.mount(t, f.uid)
			inside(t, u, f.uid, "posix")
		})
	}
}

func testPosix(t *testing.T, mnt string) {
	for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
		switch name {
		case "FcntlFlockLocksFile":
			continue // it wants of a POSIX lock what no Linux filesystem does: to exclude its own process
		case "XAttrLarge":
			continue // no attribute larger than a block fits ext4, on which the upper lies
		}
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(mnt, name)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			posixtest.All[name](t, dir)
		})
	}
}
