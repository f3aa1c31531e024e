package monitor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// The files of a container's directory.
const (
	configFile  = "monitor.json"
	lockFile    = "lock"
	stateFile   = "state.json"
	exitFile    = "exit.json"
	logFile     = "log.json"
	oldLogFile  = "log.json.1"
	runtimeLog  = "runtime.log"
	monitorLog  = "monitor.log"
	pidFile     = "pid"
	maxSocket   = 100 // sockaddr_un has 108, and a terminal's socket has a longer name
	maxDocument = 8 << 20
)

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$`)

// FindRuntime gives the path of an OCI runtime: crun or else runc of PATH if name
// is empty, else name in PATH or as a path. Where control groups are those of two
// versions mixed, which crun refuses, runc comes first. The error says what to
// install. The daemon calls it before it mounts anything.
func FindRuntime(name string) (path string, err error) {
	if name != "" {
		path, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("find the OCI runtime %s: %w (install the package crun or runc, or name another one)", name, errors.Unwrap(err))
		}
		return filepath.Abs(path)
	}
	names := []string{"crun", "runc"}
	if hybridCgroups() {
		names = []string{"runc", "crun"}
	}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", errors.New("no OCI runtime is in PATH: install the package crun or runc")
}

// hybridCgroups reports whether systemd mounted cgroup2 beside the controllers of
// version 1.
func hybridCgroups() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup/unified", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

func (c *Config) check() error {
	switch {
	case !validID.MatchString(c.Container.ID):
		return fmt.Errorf("container ID %q: want letters, digits, _ and -", c.Container.ID)
	case !filepath.IsAbs(c.Container.Dir) || !filepath.IsAbs(c.Container.Root) || !filepath.IsAbs(c.RuntimeRoot) || !filepath.IsAbs(c.Socket):
		return fmt.Errorf("container %s: its directories and its socket want absolute paths", c.Container.ID)
	case len(c.Socket) > maxSocket:
		return fmt.Errorf("container %s: the path of its socket has %d bytes, the limit is %d: %s", c.Container.ID, len(c.Socket), maxSocket, c.Socket)
	}
	return nil
}

func (c *Config) logMax() int64 {
	if c.LogMax > 0 {
		return c.LogMax
	}
	return 64 << 20
}

func (c *Config) stall() time.Duration {
	if c.Stall > 0 {
		return c.Stall
	}
	return time.Minute
}

func (c *Config) path(name string) string { return filepath.Join(c.Container.Dir, name) }

// Write puts c where Launch and Main find it: into c.Container.Dir, which exists.
func Write(c Config) error {
	if err := c.check(); err != nil {
		return err
	}
	return writeFile(c.Container.Dir, configFile, c)
}

// Read gives the Config of a container's directory.
func Read(dir string) (Config, error) {
	var c Config
	if err := readFile(filepath.Join(dir, configFile), &c); err != nil {
		return c, err
	}
	return c, c.check()
}

// readFile decodes a JSON document.
func readFile(path string, v any) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Size() > maxDocument {
		return fmt.Errorf("read %s: %d bytes, the limit is %d", path, st.Size(), maxDocument)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// writeFile puts a JSON document in the place of an older one, at once.
func writeFile(dir, name string, v any) error {
	s := newSlot(dir, name)
	defer s.close()
	return s.write(v)
}

// slotSize is what a slot keeps on the disk for its next document.
const slotSize = 4096

// slot is a file that is replaced at once. The space for the next document is
// taken ahead, so that a full disk does not keep a container's end from being
// written down.
type slot struct {
	dir, name string
	spare     *os.File // may be nil
}

func newSlot(dir, name string) *slot {
	s := &slot{dir: dir, name: name}
	s.reserve()
	return s
}

func (s *slot) reserve() {
	f, err := os.OpenFile(filepath.Join(s.dir, s.name+".new"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return // write will say why
	}
	// Without space the write will tell.
	_ = unix.Fallocate(int(f.Fd()), 0, 0, slotSize)
	s.spare = f
}

func (s *slot) write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if s.spare == nil {
		s.reserve()
	}
	if s.spare == nil {
		return fmt.Errorf("write %s: cannot be made", filepath.Join(s.dir, s.name))
	}
	f := s.spare
	s.spare = nil
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Truncate(int64(len(b)))
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, s.name))
	}
	return err
}

func (s *slot) close() {
	if s.spare != nil {
		s.spare.Close()
		os.Remove(s.spare.Name())
		s.spare = nil
	}
}

// lock takes the lock of a container's directory, waiting as long as given for a
// monitor that is about to end. Closing the file gives it back, and so would
// closing any other descriptor of it in this process (fcntl_locking(2)).
func lock(dir string, patience time.Duration) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			return f, nil
		}
		if !heldByOther(err) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// holder gives the pid of the monitor that has the container, 0 if none has. Only
// locks of this kind name their holder.
func holder(dir string) (pid int, err error) {
	f, err := os.Open(filepath.Join(dir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil {
		return 0, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	if l.Type == unix.F_UNLCK {
		return 0, nil
	}
	return int(l.Pid), nil
}

// heldByOther reports whether a lock was not to be had because another process has
// it.
func heldByOther(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) }
