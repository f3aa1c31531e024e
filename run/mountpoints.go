package run

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const madeFile = "made.json"

// mountPoints makes in the root what is missing to mount on, and notes it in the
// bundle. What lies below another mount is the runtime's to make.
func mountPoints(t *tree, dir string, mounts []specs.Mount) error {
	// What an end that came too early left is still to be taken away.
	all, err := readMade(dir)
	if err != nil {
		return err
	}
	for i, m := range mounts {
		below := func(upper specs.Mount) bool { return strings.HasPrefix(m.Destination, upper.Destination+"/") }
		if slices.ContainsFunc(mounts[:i], below) {
			continue
		}
		isDir := true
		if m.Type == "bind" {
			fi, err := os.Stat(m.Source)
			if err != nil {
				return fmt.Errorf("mount at %s: %w", m.Destination, err)
			}
			isDir = fi.IsDir()
		}
		fresh, err := t.make(m.Destination, isDir, 0o755)
		for _, n := range fresh {
			if !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
		if err != nil {
			return errors.Join(fmt.Errorf("make the mount point %s: %w", m.Destination, err), writeMade(dir, all))
		}
	}
	return writeMade(dir, all)
}

func readMade(dir string) ([]made, error) {
	raw, err := os.ReadFile(filepath.Join(dir, madeFile))
	if os.IsNotExist(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var all []made
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, madeFile), err)
	}
	return all, nil
}

func writeMade(dir string, all []made) error {
	raw, err := json.Marshal(all)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, madeFile)
	if err := os.WriteFile(file+".new", raw, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Tidy takes away the mount points that Make made in the root and that nobody
// has put anything in: they would be changes of the user's. Call it when the
// runtime has deleted the container and the root is still mounted. It does
// nothing where there is no bundle.
func Tidy(c Container) error {
	dir := filepath.Join(c.Dir, bundleDir)
	all, err := readMade(dir)
	if err != nil || len(all) == 0 {
		return err
	}
	t, err := openTree(c.Root)
	if err != nil {
		return fmt.Errorf("tidy the root of container %s: %w", c.ID, err)
	}
	defer t.Close()
	var left []made
	for _, m := range slices.Backward(all) {
		if rerr := t.remove(m); rerr != nil {
			err = errors.Join(err, fmt.Errorf("tidy %s: %w", m.Path, rerr))
			left = append(left, m)
		}
	}
	slices.Reverse(left)
	return errors.Join(err, writeMade(dir, left))
}

// MountPoints are the names, relative to the root and sorted, that Make made
// there and that are there no longer than the container: a commit of a running
// one leaves them out if they are empty. It reads the bundle below dir
// (Container.Dir), never the root.
func MountPoints(dir string) ([]string, error) {
	all, err := readMade(filepath.Join(dir, bundleDir))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range all {
		out = append(out, m.Path)
	}
	slices.Sort(out)
	return out, nil
}
