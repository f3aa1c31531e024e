package commit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// Limits of a profile. A start-up reads some thousand files.
const (
	maxProfile      = 64 << 20 // bytes
	maxProfileLine  = 64 << 10
	maxProfilePaths = 1 << 18
)

// Profile is the files that a start reads, in the order of their first reads.
type Profile struct {
	lines []profileLine
}

type profileLine struct {
	path     string        // as index.Clean gives it
	manifest digest.Digest // of the image it was recorded on, "" if that is not known
	layer    int           // in that image, counted from the lowest; -1 if not known
}

// ParseProfile reads a profile: one path a line, or one JSON object a line as
// stargz-snapshotter records it, {"path": "usr/bin/sh", "manifestDigest":
// "sha256:…", "layerIndex": 0}, of which all but the path may be missing. Empty
// lines and those that begin with "#" say nothing.
func ParseProfile(r io.Reader) (*Profile, error) {
	p := &Profile{}
	lines := bufio.NewScanner(io.LimitReader(r, maxProfile+1))
	lines.Buffer(nil, maxProfileLine)
	size := 0
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSuffix(lines.Text(), "\r")
		if size += len(text) + 1; size > maxProfile {
			return nil, fmt.Errorf("profile of more than %d bytes", maxProfile)
		}
		if t := strings.TrimSpace(text); t == "" || t[0] == '#' {
			continue
		}
		line, err := parseProfileLine(text)
		if err != nil {
			return nil, fmt.Errorf("profile: line %d: %w", n, err)
		}
		if len(p.lines) >= maxProfilePaths {
			return nil, fmt.Errorf("profile of more than %d paths", maxProfilePaths)
		}
		p.lines = append(p.lines, line)
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return nil, fmt.Errorf("profile: a line of more than %d bytes", maxProfileLine)
	} else if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return p, nil
}

// Paths gives the files, as [index.Clean] gives paths.
func (p *Profile) Paths() []string {
	out := make([]string, len(p.lines))
	for i, l := range p.lines {
		out[i] = l.path
	}
	return out
}

func parseProfileLine(text string) (profileLine, error) {
	line := profileLine{layer: -1}
	name := text
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		var record struct {
			Path           string        `json:"path"`
			ManifestDigest digest.Digest `json:"manifestDigest"`
			LayerIndex     *int          `json:"layerIndex"`
		}
		if err := json.Unmarshal([]byte(text), &record); err != nil {
			return line, err
		}
		name, line.manifest = record.Path, record.ManifestDigest
		if record.LayerIndex != nil {
			if line.layer = *record.LayerIndex; line.layer < 0 {
				return line, fmt.Errorf("layer %d", line.layer)
			}
		}
	}
	var err error
	line.path, err = index.Clean(name)
	return line, err
}

// search is for the files of a profile in the layers of one image.
type search struct {
	paths []sought
	names map[string]bool // the paths and all directories on the way to them
}

// sought is a path of the profile.
type sought struct {
	path        string
	layer       int  // the only one that counts, -1 for the one whose file is seen
	done, found bool // done: no layer below can have it
}

// search begins one. What was recorded on another image has the layers of that
// one: here the path alone counts.
func (p *Profile) search(m *image.Manifest) *search {
	s := &search{names: map[string]bool{}}
	seen := map[sought]bool{}
	for _, l := range p.lines {
		if l.manifest != "" && l.manifest != m.Digest {
			l.layer = -1
		}
		w := sought{path: l.path, layer: l.layer}
		if l.path == "" || seen[w] {
			continue
		}
		seen[w] = true
		s.paths = append(s.paths, w)
		addWithParents(s.names, l.path)
	}
	return s
}

func addWithParents(names map[string]bool, name string) {
	for ; !names[name]; name, _ = splitName(name) {
		if names[name] = true; name == "" {
			return
		}
	}
}

// missing counts the paths that no layer has.
func (s *search) missing() (n int) {
	for _, w := range s.paths {
		if !w.found {
			n++
		}
	}
	return n
}

// take gives the paths that a layer, which lies at some places of the image, shows
// in the merged image. The layers above it were asked before.
func (s *search) take(at []int, sights map[string]*sight) (taken []string) {
	for i := range s.paths {
		w := &s.paths[i]
		if w.done || w.layer >= 0 && !slices.Contains(at, w.layer) {
			continue
		}
		if has(sights, w.path) {
			w.done, w.found = true, true
			taken = append(taken, w.path)
			continue
		}
		w.done = w.layer >= 0 || hides(sights, w.path)
	}
	return taken
}
