package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// What is noted of images that came for containerd, and the directories in which each
// has a file of its own.
const (
	notedNames  = "pulled" // those by which it came for containerd only
	notedLayers = "layers" // their digests, the lowest first
)

func (c *Chains) notesDir(what string) string {
	return filepath.Join(c.d.dirs.State, "containerd", what)
}

func (c *Chains) notePath(what string, manifest digest.Digest) string {
	return filepath.Join(c.notesDir(what), manifest.Encoded())
}

// noted gives what is noted of an image, nothing where nothing is.
func (c *Chains) noted(what string, manifest digest.Digest) ([]string, error) {
	b, err := os.ReadFile(c.notePath(what, manifest))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(b)), err
}

// note is noted's other side.
func (c *Chains) note(what string, manifest digest.Digest, lines []string) error {
	path := c.notePath(what, manifest)
	if len(lines) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.MkdirAll(c.notesDir(what), 0o700); err != nil {
		return err
	}
	return writeWhole(path, []byte(strings.Join(lines, "\n")))
}
