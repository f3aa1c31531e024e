package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// machine is a directory with a machine's files, and programs that only say that they
// were run.
type machine struct {
	t   *testing.T
	dir string
	ran []string
	// answer gives what a program prints; nil is nothing, without an error.
	answer func(line string) (string, error)
}

func newMachine(t *testing.T, files map[string]string) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir()}
	for path, text := range files {
		m.put(path, text)
	}
	return m
}

func (m *machine) put(path, text string) {
	m.t.Helper()
	must(m.t, os.MkdirAll(filepath.Dir(filepath.Join(m.dir, path)), 0o755))
	must(m.t, os.WriteFile(filepath.Join(m.dir, path), []byte(text), 0o644))
}

func (m *machine) get(path string) string {
	m.t.Helper()
	b, err := os.ReadFile(filepath.Join(m.dir, path))
	must(m.t, err)
	return string(b)
}

// tree gives everything on the machine: what lies where, with its mode and contents.
func (m *machine) tree() string {
	m.t.Helper()
	var s strings.Builder
	must(m.t, filepath.WalkDir(m.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(path)
		must(m.t, err)
		text := ""
		if st.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			must(m.t, err)
			text = string(b)
		}
		fmt.Fprintf(&s, "%s %v %q\n", strings.TrimPrefix(path, m.dir), st.Mode(), text)
		return nil
	}))
	return s.String()
}

func (m *machine) node(offline bool) Node {
	return Node{Prefix: m.dir, Offline: offline, Run: func(_ context.Context, name string, args ...string) ([]byte, error) {
		line := strings.Join(append([]string{filepath.Base(name)}, args...), " ")
		m.ran = append(m.ran, line)
		if m.answer == nil {
			return nil, nil
		}
		out, err := m.answer(line)
		return []byte(out), err
	}}
}

// containerd is an installation on the machine, of files alone.
func (m *machine) containerd(version string) *Containerd {
	return &Containerd{Node: m.node(true), Name: "varve", Address: "/run/varve/snapshotter.sock", Root: "/var/lib/varve", Version: version}
}

// install installs, and says what was done.
func (m *machine) install(c *Containerd) ([]string, error) {
	p, err := c.PlanInstall(context.Background())
	if err != nil {
		return nil, err
	}
	return c.Do(context.Background(), p)
}

func (m *machine) uninstall(c *Containerd) ([]string, error) {
	p, err := c.PlanUninstall(context.Background())
	if err != nil {
		return nil, err
	}
	return c.Do(context.Background(), p)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refuses has something fail for a reason and change nothing.
func (m *machine) refuses(want string, do func() error) {
	m.t.Helper()
	before := m.tree()
	err := do()
	if err == nil || !strings.Contains(err.Error(), want) {
		m.t.Errorf("error %v, want one with %q", err, want)
	}
	if after := m.tree(); after != before {
		m.t.Errorf("something was changed:\n%s\nit was:\n%s", after, before)
	}
}

var errNo = errors.New("no")
