package test

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/bench/forms"
)

var posixDirs = flag.String("posixdirs", "", "directories in which TestPosix itself runs the suite, for its own use")

// posixExceptions are what of go-fuse's suite fails on a writer and not on a plain
// overlayfs, each with its reason.
var posixExceptions = map[string]map[string]string{
	"kernel": {},
	"fuse":   {},
}

// TestPosix runs go-fuse's suite on both writers, and on a plain overlayfs of two
// directories, in a process of its own: some of it counts that process's open
// files, and what fails on the plain one may fail on ours too.
func TestPosix(t *testing.T) {
	if *posixDirs != "" {
		for dir := range strings.SplitSeq(*posixDirs, ",") {
			t.Run(filepath.Base(dir), func(t *testing.T) { posixSuite(t, dir) })
		}
		return
	}
	needRoot(t)
	l, _ := small(t, 3, 1000)
	_, ref := serve(t, forms.EStargz, l)
	h := newHost(t)
	plain := filepath.Join(t.TempDir(), "plain")
	for _, d := range []string{"lower", "upper", "work", "plain"} {
		must(t, os.MkdirAll(filepath.Join(filepath.Dir(plain), d), 0o755))
	}
	in := filepath.Dir(plain)
	must(t, unix.Mount("plain", plain, "overlay", 0, "lowerdir="+in+"/lower,upperdir="+in+"/upper,workdir="+in+"/work"))
	t.Cleanup(func() { unix.Unmount(plain, unix.MNT_DETACH) })
	dirs := []string{plain}
	for _, overlay := range overlays {
		dirs = append(dirs, h.writable(overlay, overlay, ref))
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestPosix$", "-test.v", "-posixdirs", strings.Join(dirs, ","))
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	outcome := map[string]string{} // of a test: PASS, FAIL, SKIP
	for _, m := range regexp.MustCompile(`(?m)^ +--- ([A-Z]+): TestPosix/(\w+/\w+)`).FindAllStringSubmatch(string(out), -1) {
		outcome[m[2]] = m[1]
	}
	bad := false
	for _, overlay := range overlays {
		t.Run(overlay, func(t *testing.T) {
			for name := range posixtest.All {
				got, want := outcome[overlay+"/"+name], outcome["plain/"+name]
				reason := posixExceptions[overlay][name]
				switch {
				case got == "":
					t.Errorf("%s was not run", name)
				case got == "PASS" && reason != "":
					t.Errorf("%s passes: it is no exception any more", name)
				case got != "PASS" && got != want && reason == "":
					t.Errorf("%s: %s, on a plain overlayfs %s", name, got, want)
				}
			}
			bad = bad || t.Failed()
		})
	}
	if bad {
		t.Logf("%s", out)
	}
	h.ok("umount", "-a")
}

func posixSuite(t *testing.T, dir string) {
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range posixtest.All {
			if !yield(name) {
				return
			}
		}
	})
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			in := filepath.Join(dir, name)
			must(t, os.Mkdir(in, 0o755))
			posixtest.All[name](t, in)
			must(t, os.RemoveAll(in))
		})
	}
}
