package run

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// place is something that users mount into a container.
type place struct {
	kind        placeKind
	source      string // host directory or volume's name, "" for a volume of the container's own
	dest        string // absolute and clean
	readOnly    bool
	noCopy      bool   // leave what the image has there out of a new volume
	propagation string // "" for rprivate
	options     []string
}

type placeKind int

const (
	bindPlace placeKind = iota
	volumePlace
	tmpfsPlace
)

// maxVolumes is the most that an image may have.
const maxVolumes = 1000

var volumeName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// modes are the words that may stand behind a volume, by what they speak of: one
// of a kind is enough.
var modes = map[string]string{
	"ro": "writing", "rw": "writing",
	"z": "label", "Z": "label",
	"copy": "copy", "nocopy": "copy",
	"consistent": "consistency", "cached": "consistency", "delegated": "consistency",
	"private": "propagation", "rprivate": "propagation", "slave": "propagation", "rslave": "propagation", "shared": "propagation", "rshared": "propagation",
}

// parseVolume reads the argument of -v as docker does. SELinux labels and
// consistency, which only other systems know, are read and mean nothing.
func parseVolume(s string) (place, error) {
	var p place
	bad := fmt.Errorf("invalid volume specification: '%s'", s)
	parts := strings.SplitN(s, ":", 4)
	mode := ""
	switch len(parts) {
	case 1:
		p.dest = parts[0]
	case 2:
		if parseMode(parts[1], &place{}) {
			return p, bad
		}
		p.source, p.dest = parts[0], parts[1]
	case 3:
		p.source, p.dest, mode = parts[0], parts[1], parts[2]
	default:
		return p, bad
	}
	if parts[0] == "" {
		return p, bad
	}
	if mode != "" && !parseMode(mode, &p) {
		return p, fmt.Errorf("invalid mode: %s", mode)
	}
	var err error
	if p.dest, err = mountPath(p.dest); err != nil {
		return p, fmt.Errorf("%w: %w", bad, err)
	}
	switch {
	case path.IsAbs(p.source):
		p.source = path.Clean(p.source)
		if p.noCopy {
			return p, fmt.Errorf("%w: nocopy is for volumes", bad)
		}
		return p, nil
	case p.source != "" && !volumeName.MatchString(p.source):
		return p, fmt.Errorf(`%q includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path`, p.source)
	case p.propagation != "":
		return p, fmt.Errorf("%w: propagation is for host directories", bad)
	}
	p.kind = volumePlace
	return p, nil
}

func parseMode(mode string, p *place) bool {
	seen := map[string]bool{}
	for word := range strings.SplitSeq(mode, ",") {
		kind := modes[word]
		if kind == "" || seen[kind] {
			return false
		}
		seen[kind] = true
		switch {
		case word == "ro":
			p.readOnly = true
		case word == "nocopy":
			p.noCopy = true
		case kind == "propagation":
			p.propagation = word
		}
	}
	return true
}

// mountPath is a clean place in a container.
func mountPath(dest string) (string, error) {
	if !path.IsAbs(dest) {
		return "", fmt.Errorf("invalid mount path: '%s' mount path must be absolute", dest)
	}
	if dest = path.Clean(dest); dest == "/" {
		return "", errors.New("invalid specification: destination can't be '/'")
	}
	if strings.ContainsRune(dest, 0) {
		return "", fmt.Errorf("invalid mount path: %q", dest)
	}
	return dest, nil
}

// tmpfsFlags are options of a tmpfs, by what they speak of; a later one wins.
var tmpfsFlags = map[string]string{
	"exec": "exec", "noexec": "exec", "suid": "suid", "nosuid": "suid", "dev": "dev", "nodev": "dev",
	"ro": "ro", "rw": "ro", "sync": "sync", "async": "sync", "dirsync": "dirsync",
	"atime": "atime", "noatime": "atime", "relatime": "relatime", "norelatime": "relatime",
	"strictatime": "strictatime", "nostrictatime": "strictatime", "diratime": "diratime", "nodiratime": "diratime",
	"private": "p", "rprivate": "p", "shared": "p", "rshared": "p", "slave": "p", "rslave": "p",
}

var tmpfsData = []string{"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"}

// parseTmpfs reads the argument of --tmpfs.
func parseTmpfs(s string) (place, error) {
	dest, opts, _ := strings.Cut(s, ":")
	dest, err := mountPath(dest)
	if err != nil {
		return place{}, err
	}
	p := place{kind: tmpfsPlace, dest: dest, options: []string{"noexec", "nosuid", "nodev", "rprivate"}}
	for opt := range strings.SplitSeq(opts, ",") {
		if opt == "" {
			continue
		}
		key, _, isData := strings.Cut(opt, "=")
		kind := tmpfsFlags[opt]
		if isData && slices.Contains(tmpfsData, key) {
			p.options = slices.DeleteFunc(p.options, func(o string) bool { return strings.HasPrefix(o, key+"=") })
		} else if kind != "" {
			p.options = slices.DeleteFunc(p.options, func(o string) bool { return tmpfsFlags[o] == kind })
		} else {
			return p, fmt.Errorf("Invalid tmpfs option %q", opt)
		}
		p.options = append(p.options, opt)
	}
	return p, nil
}

// places are all that users mount into a container, and the image's volumes where
// they mount nothing else, upper directories first.
func places(o Options, image ocispec.ImageConfig) ([]place, error) {
	var out []place
	add := func(p place, err error) error {
		if err != nil {
			return err
		}
		if slices.ContainsFunc(out, func(q place) bool { return q.dest == p.dest }) {
			return fmt.Errorf("Duplicate mount point: %s", p.dest)
		}
		out = append(out, p)
		return nil
	}
	for _, v := range o.Volumes {
		if err := add(parseVolume(v)); err != nil {
			return nil, err
		}
	}
	for _, t := range o.Tmpfs {
		if err := add(parseTmpfs(t)); err != nil {
			return nil, err
		}
	}
	if len(image.Volumes) > maxVolumes {
		return nil, fmt.Errorf("the image has %d volumes, the limit is %d", len(image.Volumes), maxVolumes)
	}
	for _, v := range slices.Sorted(maps.Keys(image.Volumes)) {
		dest, err := mountPath(v)
		if err != nil {
			return nil, fmt.Errorf("a volume of the image: %w", err)
		}
		if !slices.ContainsFunc(out, func(q place) bool { return q.dest == dest }) {
			out = append(out, place{kind: volumePlace, dest: dest})
		}
	}
	slices.SortStableFunc(out, func(a, b place) int { return cmp.Compare(strings.Count(a.dest, "/"), strings.Count(b.dest, "/")) })
	return out, nil
}

// directory is the name of the directory of a volume without a name.
func (p place) directory() string {
	if p.source != "" {
		return p.source
	}
	sum := sha256.Sum256([]byte(p.dest))
	return hex.EncodeToString(sum[:])
}
