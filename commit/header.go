package commit

import (
	"archive/tar"
	"cmp"
	"fmt"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/fs/upper"
	"github.com/varvefs/varve/index"
)

// header gives the tar header of a change. It holds nothing of the machine: no
// times but that of modification, and no names of owners. lost are the extended
// attributes that it cannot hold.
func header(c *upper.Change, clamp *time.Time) (h *tar.Header, lost []string, err error) {
	h = &tar.Header{
		Name: c.Path, Mode: int64(c.Mode &^ unix.S_IFMT), Uid: int(c.UID), Gid: int(c.GID), ModTime: mtime(c),
	}
	if clamp != nil && h.ModTime.After(*clamp) {
		h.ModTime = clamp.Truncate(time.Second).UTC()
	}
	switch c.Type() {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, c.Size
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		if h.Name += "/"; c.Path == "" {
			h.Name = "./"
		}
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, c.Link
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if c.Type() == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(c.Rdev)), int64(unix.Minor(c.Rdev))
		if _, err := index.Mkdev(h.Devmajor, h.Devminor); err != nil {
			return nil, nil, err
		}
	default:
		return nil, nil, fmt.Errorf("a file of mode %o has no form in a tar", c.Mode)
	}
	for _, x := range c.Xattrs {
		switch {
		case strings.Contains(x.Name, "="), isMark(x.Name): // "=" ends a PAX record's key
			lost = append(lost, x.Name)
		case leftOut(x.Name):
		default:
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords[paxXattr+x.Name] = string(x.Value)
		}
	}
	return h, lost, nil
}

// link makes of a file's header that of one more name of the file. It keeps
// owner, mode and extended attributes: who unpacks it sets the owner of every
// entry, and setting that takes a file's capabilities away (setattr_prepare in
// the kernel's fs/attr.c), so that each has to bring them again.
func link(h *tar.Header, first string) {
	h.Typeflag, h.Linkname, h.Size, h.Devmajor, h.Devminor = tar.TypeLink, first, 0, 0, 0
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// compareNames orders the names of a layer's entries: by directories, and in a
// directory the opaque marker before the whiteouts before all else (image-spec,
// layer.md, "Whiteouts": they should come before their siblings).
func compareNames(a, b string) int {
	a, b = strings.TrimSuffix(strings.TrimPrefix(a, "./"), "/"), strings.TrimSuffix(strings.TrimPrefix(b, "./"), "/")
	for a != "" && b != "" {
		var x, y string
		x, a, _ = strings.Cut(a, "/")
		y, b, _ = strings.Cut(b, "/")
		if x != y {
			return cmp.Or(cmp.Compare(rank(x), rank(y)), strings.Compare(x, y))
		}
	}
	return cmp.Compare(len(a), len(b))
}

func rank(name string) int {
	switch {
	case name == whiteoutOpaque:
		return 0
	case strings.HasPrefix(name, whiteoutPrefix):
		return 1
	}
	return 2
}

// secrets are the files that are committed by mistake most often, as patterns of
// the last names of their paths.
var secrets = []string{
	".ssh/id_*", ".ssh/*.pem", ".aws/credentials", ".netrc", ".git-credentials", ".pypirc", ".npmrc", ".pgpass",
	".docker/config.json", ".kube/config", ".vault-token", ".gnupg/private-keys-v1.d/*",
	".config/gh/hosts.yml", ".config/gcloud/application_default_credentials.json", ".azure/accessTokens.json",
	".bash_history", ".zsh_history", ".ash_history", ".python_history", ".mysql_history", ".psql_history",
	"*private*.pem", "*privkey*.pem", "*-key.pem", "key.pem", "*.p12", "*.pfx", "id_rsa", "id_ecdsa", "id_ed25519",
}

// isSecret reports whether a file's name says that it holds a secret.
func isSecret(name string) bool {
	if strings.HasSuffix(name, ".pub") {
		return false
	}
	for _, pattern := range secrets {
		if !strings.HasSuffix(name, pattern[strings.LastIndexByte(pattern, '*')+1:]) {
			continue // as almost every name, at no cost
		}
		from := len(name)
		for range strings.Count(pattern, "/") + 1 {
			from = strings.LastIndexByte(name[:max(from, 0)], '/')
		}
		if ok, _ := path.Match(pattern, name[from+1:]); ok {
			return true
		}
	}
	return false
}
