package daemon

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/fetch/profile"
	"github.com/varvefs/varve/index"
)

// files calls fn for every regular file of the image that has contents, once
// however many names it has: with the first.
func (t *tree) files(fn func(path string, in *index.Inode)) error {
	linked := map[uint64]bool{}
	var walk func(path string, nid uint64, depth int) error
	walk = func(path string, nid uint64, depth int) error {
		in, err := t.index.Inode(nid)
		if err != nil {
			return err
		}
		if !in.IsDir() {
			if in.Mode&unix.S_IFMT != unix.S_IFREG || in.Size == 0 || linked[nid] {
				return nil
			}
			if in.Nlink > 1 {
				linked[nid] = true
			}
			fn(path, &in)
			return nil
		}
		if depth > index.MaxPath {
			return index.ErrMalformed
		}
		var werr error
		err = t.index.ReadDir(&in, 0, func(e index.Dirent, _ uint64) bool {
			if name := string(e.Name); name != "." && name != ".." {
				werr = walk(path+"/"+name, e.Nid, depth+1)
			}
			return werr == nil
		})
		return cmp.Or(werr, err)
	}
	return walk("", t.index.Root(), 0)
}

// ProfileFile is a file that a start reads.
type ProfileFile struct {
	Path    string  `json:"Path"`
	Seconds float64 `json:"Seconds"` // from the first read of the start to the first of it
	Bytes   int64   `json:"Bytes"`   // of it that are read
	Size    int64   `json:"Size"`
}

// profileFiles gives the files that a profile of the image names ranges of, in the
// order in which they are read first.
func (t *tree) profileFiles(p *profile.Profile) ([]ProfileFile, error) {
	byLayer := make([][]int, len(t.layers)) // places in p.Uses, by offset
	for i, u := range p.Uses {
		byLayer[u.Layer] = append(byLayer[u.Layer], i)
	}
	for _, l := range byLayer {
		slices.SortFunc(l, func(a, b int) int { return cmp.Compare(p.Uses[a].Off, p.Uses[b].Off) })
	}
	type found struct {
		ProfileFile
		use int
		off int64
	}
	var out []found
	err := t.files(func(path string, in *index.Inode) {
		layer, off, ok, err := t.index.Extent(in)
		if err != nil || !ok {
			return
		}
		l := byLayer[layer]
		from, _ := slices.BinarySearchFunc(l, off, func(i int, off int64) int {
			if p.Uses[i].Off+p.Uses[i].N <= off {
				return -1
			}
			return 1
		})
		f := found{ProfileFile: ProfileFile{Path: path, Size: in.Size}, use: -1, off: off}
		for _, i := range l[from:] {
			u := p.Uses[i]
			n := min(u.Off+u.N, off+in.Size) - max(u.Off, off)
			if n <= 0 {
				break
			}
			f.Bytes += n
			if f.use < 0 || i < f.use {
				f.use = i
			}
		}
		if f.use >= 0 {
			f.Seconds = p.Uses[f.use].After.Seconds()
			out = append(out, f)
		}
	})
	slices.SortFunc(out, func(a, b found) int {
		return cmp.Or(cmp.Compare(a.use, b.use), cmp.Compare(a.off, b.off))
	})
	files := make([]ProfileFile, len(out))
	for i := range out {
		files[i] = out[i].ProfileFile
	}
	return files, err
}

// profileOfPaths makes a profile of files, as a start that reads each whole. missing
// counts paths that are no files of the image.
func (t *tree) profileOfPaths(paths []string) (uses []profile.Use, missing int) {
	for _, path := range paths {
		in, err := t.resolve(path, true)
		if err != nil || in.Mode&unix.S_IFMT != unix.S_IFREG {
			if err != nil || !in.IsDir() {
				missing++
			}
			continue
		}
		if layer, off, ok, err := t.index.Extent(&in); err == nil && ok {
			uses = append(uses, profile.Use{Layer: layer, Off: off, N: in.Size})
		}
	}
	return profile.Tidy(profileLayers(t), uses), missing
}

// toConvert makes of a profile what conversions read: paths, in its order.
func (t *tree) toConvert(p *profile.Profile) (*commit.Profile, error) {
	files, err := t.profileFiles(p)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	for _, f := range files {
		if err := enc.Encode(map[string]string{"path": f.Path}); err != nil {
			return nil, err
		}
	}
	return commit.ParseProfile(&text)
}
