// Package test drives the real binary: its daemon is another process, so the
// tests may read the mounts that it serves.
package test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// The programs under test, built once.
var (
	varve string // the command
	child string // test/child, linked statically so that it runs from any image
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "vt-bin-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // other users run them too
		return 0, err
	}
	for path, pkg := range map[*string]string{&varve: "../cmd/varve", &child: "./child"} {
		*path = filepath.Join(dir, filepath.Base(pkg))
		cmd := exec.Command("go", "build", "-o", *path, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	return m.Run(), nil
}

// need skips a test where the machine lacks something, which is a failure where
// nothing may be skipped.
func need(t *testing.T, have bool, what string) {
	t.Helper()
	switch {
	case have:
	case os.Getenv("VARVE_NO_SKIP") != "" || os.Getenv("CI") != "":
		t.Fatalf("this machine lacks %s, and nothing may be skipped here", what)
	default:
		t.Skipf("this machine lacks %s", what)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	need(t, os.Geteuid() == 0, "a root user for this test")
	_, err := os.Stat("/dev/fuse")
	need(t, err == nil, "/dev/fuse")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustGet gives a value that cannot be had with an error.
func mustGet[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		must(t, err)
		return v
	}
}
