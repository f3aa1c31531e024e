package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
)

// The faces that a mount can have.
const (
	faceAuto   = "auto"
	faceKernel = "kernel"
	faceFuse   = "fuse"
)

// hasKernelFace is why a mount has the kernel face where none was asked for.
const hasKernelFace = "the kernel can mount EROFS over files served by FUSE"

// faces mounts trees. Whether the kernel's EROFS can read through a FUSE file is
// found out by doing it, once, when it is first asked.
type faces struct {
	d     *Daemon
	probe func() error

	lowering sync.Mutex // held while a lower comes or goes; taken before mu

	mu     sync.Mutex // guards what follows
	data   *fs.DataFiles
	served *fs.Served
	lowers map[string]*lower // by directory
	plain  map[string]int    // by layer: kernel mounts that read its data file in place; less than 0 while it is dropped
}

func newFaces(d *Daemon) *faces {
	f := &faces{d: d, lowers: map[string]*lower{}, plain: map[string]int{}}
	f.probe = sync.OnceValue(f.tryKernel)
	return f
}

// face is a mounted face.
type face interface {
	Unmount(lazy bool) error
	Done() <-chan struct{}
}

// choose gives the face for a mount and the reason, or an error where the one
// that was asked for cannot be had.
func (f *faces) choose(asked string) (kind, reason string, err error) {
	switch asked {
	case faceFuse:
		return faceFuse, "asked for", nil
	case faceKernel, faceAuto, "":
	default:
		return "", "", fmt.Errorf("face %q: want auto, kernel or fuse%w", asked, silent{errUsage})
	}
	why := f.probe()
	switch {
	case why == nil && asked == faceKernel:
		return faceKernel, "asked for", nil
	case why == nil:
		return faceKernel, hasKernelFace, nil
	case asked == faceKernel:
		return "", "", fmt.Errorf("the kernel face cannot be had here: %w (--face fuse works without)", why)
	}
	return faceFuse, "no kernel face: " + why.Error(), nil
}

func (f *faces) options(t *tree, setuid bool) fs.Options {
	return fs.Options{Metrics: f.d.m, Log: f.d.log, Setuid: setuid, Xattrs: t.index.HasXattrs(), Fault: f.d.treeFault(t.layers)}
}

func (f *faces) mount(dir, kind string, t *tree, setuid bool) (face, error) {
	o := f.options(t, setuid)
	if kind == faceKernel {
		return f.kernel(dir, t, o, false)
	}
	s, err := fs.Serve(dir, fs.NewTree(t.index.Image, t.data(), o), o)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// beneath mounts the kernel face of t beneath the mount at dir that has this id.
// Plain has it read all layers in place, or fail with errNotReady.
func (f *faces) beneath(dir string, id uint64, t *tree, setuid, plain bool) (*kernelFace, error) {
	o := f.options(t, setuid)
	o.Beneath = id
	return f.kernel(dir, t, o, plain)
}

func (f *faces) kernel(dir string, t *tree, o fs.Options, plain bool) (_ *kernelFace, err error) {
	k := &kernelFace{faces: f}
	defer func() {
		if err != nil {
			f.leave(k.plain)
		}
	}()
	paths := make([]string, len(t.layers))
	for i, l := range t.layers {
		if f.claim(l) {
			k.plain = append(k.plain, l.Key)
			paths[i] = l.Path()
			continue
		}
		if plain {
			return nil, errNotReady
		}
		k.served = true
		o.Direct = o.Direct || l.About().Unproven
		if paths[i], err = f.serve(dataName(l.Key), l.Layer); err != nil {
			return nil, err
		}
	}
	if o.Direct {
		for _, path := range paths {
			f.data.Direct(filepath.Base(path))
		}
	}
	if k.Kernel, err = fs.MountKernel(dir, t.index.file, paths, o); err != nil {
		return nil, err
	}
	if k.served && o.Beneath == 0 {
		k.id, _ = fs.MountID(dir) // without it, it stays as it is
	}
	return k, nil
}

// kernelFace is the kernel's EROFS over the data files of layers.
type kernelFace struct {
	*fs.Kernel
	faces  *faces
	plain  []string // the layers whose data files it reads in place
	served bool     // whether there are others, which it reads from us
	id     uint64   // see [fs.MountID]; 0 where that is not known

	stays error     // why it did not change over; guarded by Daemon.mu, as is
	again time.Time // when it is to be tried again, zero for never
}

// Unmount ends the mount. Nobody says when the last has left one that was taken
// out of sight: its data files count as read for as long as the daemon lives.
func (k *kernelFace) Unmount(lazy bool) error {
	err := k.Kernel.Unmount(lazy)
	select {
	case <-k.Done():
		k.faces.leave(k.plain)
		k.plain = nil
	default:
	}
	return err
}

// ready reports whether the kernel may read a layer's data file by itself: all of
// it is here, and if others made its index, that was proven.
func ready(l *fetch.Handle) bool { return l.Whole() && !l.About().Unproven }

// claim has a layer's data file stay as it is for a mount that reads it in place,
// so that nothing of ours is in the way, if that may be. Else we serve it.
func (f *faces) claim(l *fetch.Handle) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.plain[l.Key] < 0 || !ready(l) {
		return false
	}
	f.plain[l.Key]++
	return true
}

// leave undoes claims.
func (f *faces) leave(keys []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range keys {
		f.plain[k]--
	}
}

// drop drops a layer's frames, unless the kernel reads its data file in place.
func (f *faces) drop(l *fetch.Layer) (bytes int64, kept bool, err error) {
	add := func(by int) (kept bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.plain[l.Key] > 0 {
			return true
		}
		f.plain[l.Key] += by
		return false
	}
	if add(-1) {
		return 0, true, nil
	}
	defer add(1)
	bytes, err = l.Drop()
	return bytes, false, err
}

// dataName is what a layer's data file is called.
func dataName(key string) string { return strings.Replace(key, ":", "-", 1) }

// serve makes a data file visible in the FUSE directory of data files, which is
// mounted when it is first needed.
func (f *faces) serve(name string, data fs.Data) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := filepath.Join(f.d.dirs.Run, "data")
	if f.served == nil {
		if err := fs.Detach(dir); err != nil { // of a daemon that died
			return "", err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", err
		}
		o := fs.Options{Metrics: f.d.m, Log: f.d.log, Private: true}
		f.data = fs.NewDataFiles(o, func(name string, off int64, err error) {
			f.d.fault(readFault{strings.Replace(name, "-", ":", 1), off, err})
		})
		s, err := fs.Serve(dir, f.data, o)
		if err != nil {
			return "", err
		}
		s.ReadLittle()
		f.served = s
	}
	f.data.Add(name, data)
	return filepath.Join(dir, name), nil
}

// forget gives up what the kernel has cached of a layer's data file, as its own and
// as one that we serve.
func (f *faces) forget(key string, data fs.Data) {
	fs.Forget(data.Fd())
	f.mu.Lock()
	files := f.data
	f.mu.Unlock()
	if files != nil {
		files.GiveUp(dataName(key))
	}
}

// gone takes the data file of a layer away that was removed.
func (f *faces) gone(l *fetch.Layer) {
	f.mu.Lock()
	if f.plain[l.Key] == 0 { // else it is another's by now
		delete(f.plain, l.Key)
	}
	files := f.data
	f.mu.Unlock()
	if files != nil {
		files.Remove(dataName(l.Key), l)
	}
}

func (f *faces) close() {
	f.mu.Lock()
	lowers, served := f.lowers, f.served
	f.lowers = map[string]*lower{}
	f.mu.Unlock()
	for _, l := range lowers { // of mounts that somebody is still in
		l.face.Unmount(true)
		os.Remove(l.dir)
	}
	if served == nil {
		dir := filepath.Join(f.d.dirs.Run, "data")
		if err := fs.Detach(dir); err != nil { // of a daemon that died
			f.d.log.Warn("a mount of an earlier run stays", "dir", dir, "err", err)
		}
		return
	}
	if err := served.Unmount(false); err != nil {
		served.Unmount(true) // a lazily unmounted tree still has its devices open
	}
}
