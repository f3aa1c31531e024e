package run

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// fill makes the directory of a volume in top and, where it is empty, puts into
// it what the image has at its place, docker's rule. It gives its path. What was
// begun and not finished is begun anew. Several containers may share a volume with
// a name: one fills it.
func (p place) fill(t *tree, top string, plain bool) (string, error) {
	dir := filepath.Join(top, p.directory())
	data := filepath.Join(dir, "_data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		return "", fmt.Errorf("make the volume at %s: %w", p.dest, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return "", err
	}
	if p.noCopy {
		return data, nil
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	for {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("lock the volume at %s: %w", p.dest, err)
	}
	filling := filepath.Join(dir, "filling")
	if _, err := os.Lstat(filling); err == nil {
		if err := empty(data); err != nil {
			return "", fmt.Errorf("empty the unfinished volume at %s: %w", p.dest, err)
		}
	}
	if is, err := isEmpty(data); err != nil || !is {
		return data, err
	}
	from, err := t.at("."+p.dest, unix.O_PATH|unix.O_DIRECTORY)
	if err == unix.ENOENT {
		return data, nil
	} else if err != nil {
		return "", fmt.Errorf("copy the image's %s into its volume: %w", p.dest, err)
	}
	defer unix.Close(from)
	if err := os.WriteFile(filling, nil, 0o600); err != nil {
		return "", err
	}
	// The dot: the directory, not the link in /proc.
	if err := copyTree(data, procFD(from)+"/.", plain); err != nil {
		return "", fmt.Errorf("copy the image's %s into its volume: %w", p.dest, err)
	}
	return data, os.Remove(filling)
}

func copyTree(to, from string, plain bool) error {
	if plain {
		return copyPlain(to, from)
	}
	return fs.CopyDir(to, from, fs.WithXAttrErrorHandler(func(_, _, _ string, err error) error {
		return ignore(err, unix.ENOTSUP)
	}))
}

// copyPlain is for who may not give files away: all are the user's.
func copyPlain(to, from string) error {
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(name string, d iofs.DirEntry, err error) error {
		if err != nil || d.Type()&os.ModeSymlink != 0 {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		return os.Chmod(filepath.Join(to, rel), fi.Mode().Perm())
	})
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, err := f.Readdirnames(1); !errors.Is(err, io.EOF) {
		return false, err
	}
	return true, nil
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}
