package image

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// replaced puts something else in a file's place.
var replaced = map[string]func(t *testing.T, file string) error{
	"empty":     func(_ *testing.T, f string) error { return os.WriteFile(f, nil, 0o600) },
	"zeroed":    func(_ *testing.T, f string) error { return os.WriteFile(f, make([]byte, 99), 0o600) },
	"directory": func(_ *testing.T, f string) error { return os.MkdirAll(filepath.Join(f, "full"), 0o700) },
	"link":      func(_ *testing.T, f string) error { return os.Symlink("/dev/null", f) },
	"FIFO":      func(_ *testing.T, f string) error { return syscall.Mkfifo(f, 0o600) },
	"socket": func(t *testing.T, f string) error {
		t.Chdir(filepath.Dir(f)) // a socket's path has few bytes
		l, err := net.Listen("unix", filepath.Base(f))
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	},
}

// inTime fails a test that waits, for a pipe's writer say.
func inTime(t *testing.T, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); fn() }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("waits")
	}
}

func TestDamagedListOfNamesIsMovedAside(t *testing.T) {
	damages := map[string]func(*testing.T, string) error{}
	for name, fn := range replaced {
		damages[name] = func(t *testing.T, file string) error {
			if err := os.Remove(file); err != nil {
				return err
			}
			return fn(t, file)
		}
	}
	edited := func(edit func([]byte) []byte) func(*testing.T, string) error {
		return func(_ *testing.T, file string) error {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			changed := edit(bytes.Clone(b))
			if bytes.Equal(b, changed) {
				return errors.New("nothing to edit")
			}
			return os.WriteFile(file, changed, 0o600)
		}
	}
	flipped := func(old, bad string) func(*testing.T, string) error {
		return edited(func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(bad), 1) })
	}
	damages["cut"] = edited(func(b []byte) []byte { return b[:len(b)/2] })
	damages["no object"] = edited(func([]byte) []byte { return []byte("null") })
	damages["flipped brace"] = flipped("{", "[")
	damages["flipped version"] = flipped(`n": 2`, `n": 3`)
	damages["flipped key"] = flipped(`"manifests"`, `"manifestr"`)
	damages["flipped digest"] = flipped(`"digest": "sha256:`, `"digest": "sha256;`)
	damages["flipped manifest"] = flipped(`manifest": "sha256:`, `manifest": "shb256:`)
	damages["flipped name"] = flipped("docker.io/", "DOCKER.io?")
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := OpenStore(dir)
			if err != nil || s.Recovered() != nil {
				t.Fatal(s, err)
			}
			m, c := testImage(t, "nginx:1", "a")
			if err := s.Put(m, c); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "index.json")
			if err := os.MkdirAll(file+".damaged/earlier", 0o700); err != nil {
				t.Fatal(err)
			}
			if err := damage(t, file); err != nil {
				t.Fatal(err)
			}
			was, err := os.Lstat(file)
			if err != nil {
				t.Fatal(err)
			}
			inTime(t, func() { s, err = OpenStore(dir) })
			if err != nil || s.Recovered() == nil || !strings.Contains(s.Recovered().Error(), file+".damaged") {
				t.Fatalf("opened: %v, said %v", err, s.Recovered())
			}
			if is, err := os.Lstat(file + ".damaged"); err != nil || !os.SameFile(was, is) {
				t.Errorf("moved: %v", err)
			}
			if all, err := s.List(); err != nil || len(all) != 0 {
				t.Errorf("begins with %v, %v", all, err)
			}
			if _, err := s.readBlob(m.Digest, MaxManifest); err != nil {
				t.Errorf("the blobs are gone: %v", err)
			}
			if err := s.Put(m, c); err != nil {
				t.Error(err)
			}
			if s, err = OpenStore(dir); err != nil || s.Recovered() != nil {
				t.Fatalf("once more: %v", err)
			}
			if _, _, err := s.Get(m.Name, ""); err != nil {
				t.Error(err)
			}
		})
	}
}

// A list that cannot be opened just now may be whole.
func TestUnreadableListOfNamesStays(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, c := testImage(t, "nginx:1", "a")
	if err := s.Put(m, c); err != nil {
		t.Fatal(err)
	}
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, err = OpenStore(dir)
	if rerr := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); rerr != nil {
		t.Fatal(rerr)
	}
	if !errors.Is(err, syscall.EMFILE) {
		t.Errorf("opened without descriptors: %v", err)
	}
	if s, err = OpenStore(dir); err != nil || s.Recovered() != nil {
		t.Fatalf("opened: %v", err)
	}
	if _, _, err := s.Get(m.Name, ""); err != nil {
		t.Error(err)
	}
}

func TestDamagedBlobIsPutAgain(t *testing.T) {
	for name, fn := range replaced {
		for _, which := range []string{"manifest", "config"} {
			t.Run(name+" "+which, func(t *testing.T) {
				dir := t.TempDir()
				s, err := OpenStore(dir)
				if err != nil {
					t.Fatal(err)
				}
				m, c := testImage(t, "nginx:1", "a")
				if err := s.Put(m, c); err != nil {
					t.Fatal(err)
				}
				d := m.Digest
				if which == "config" {
					d = m.ConfigDesc.Digest
				}
				file := filepath.Join(dir, blobPath(d))
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
				if err := fn(t, file); err != nil {
					t.Fatal(err)
				}
				inTime(t, func() { _, _, err = s.Get(mustName(t, m.Target.String()), "") })
				if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "mount it with --pull always") {
					t.Errorf("get: %v", err)
				}
				inTime(t, func() { err = s.Put(m, c) })
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := s.Get(m.Name, ""); err != nil {
					t.Errorf("put again: %v", err)
				}
			})
		}
	}
}
