package run

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

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

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write makes files below dir: a name that ends in / is a directory, a value that
// begins with -> is a link.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, data := range files {
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		switch {
		case name[len(name)-1] == '/':
			must(t, os.MkdirAll(file, 0o755))
		case len(data) > 2 && data[:2] == "->":
			must(t, os.Symlink(data[2:], file))
		default:
			must(t, os.WriteFile(file, []byte(data), 0o644))
		}
	}
}

// build makes a program that needs nothing of a root.
func build(t *testing.T, source string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "probe.go"), []byte(source), 0o644))
	cmd := exec.Command("go", "build", "-o", "probe", "probe.go")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	return filepath.Join(dir, "probe")
}
