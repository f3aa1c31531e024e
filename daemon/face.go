package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/index"
)

// The faces that a mount can have.
const (
	faceAuto   = "auto"
	faceKernel = "kernel"
	faceFuse   = "fuse"
)

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
	plain  map[string]int    // by layer: kernel mounts that read its data file in place
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
		return faceKernel, "the kernel mounts EROFS over files served by FUSE", nil
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
		return f.kernel(dir, t, o)
	}
	s, err := fs.Serve(dir, fs.NewTree(t.index.Image, t.data(), o), o)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// beneath mounts the kernel face of t in the place of the mount at dir.
func (f *faces) beneath(dir string, t *tree, setuid bool) (face, error) {
	o := f.options(t, setuid)
	o.Beneath = true
	return f.kernel(dir, t, o)
}

func (f *faces) kernel(dir string, t *tree, o fs.Options) (face, error) {
	k := &kernelFace{faces: f}
	paths := make([]string, len(t.layers))
	for i, l := range t.layers {
		var err error
		if paths[i], err = f.device(l); err != nil {
			return nil, err
		}
		if paths[i] == l.Path() {
			k.plain = append(k.plain, l.Key)
		} else {
			o.Direct = true
		}
	}
	f.inPlace(k.plain, 1) // before it reads them
	var err error
	if k.Kernel, err = fs.MountKernel(dir, t.index.file, paths, o); err != nil {
		f.inPlace(k.plain, -1)
		return nil, err
	}
	return k, nil
}

// kernelFace is the kernel's EROFS over the data files of layers.
type kernelFace struct {
	*fs.Kernel
	faces *faces
	plain []string // the layers whose data files it reads in place
}

// Unmount ends the mount. Nobody says when the last has left one that was taken
// out of sight: its data files count as read for as long as the daemon lives.
func (k *kernelFace) Unmount(lazy bool) error {
	err := k.Kernel.Unmount(lazy)
	select {
	case <-k.Done():
		k.faces.inPlace(k.plain, -1)
		k.plain = nil
	default:
	}
	return err
}

func (f *faces) inPlace(keys []string, by int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range keys {
		f.plain[k] += by
	}
}

// readInPlace reports whether the kernel reads a layer's data file without asking.
func (f *faces) readInPlace(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.plain[key] > 0
}

// device gives the path that the kernel reads a layer's data from: the plain
// file where all of it is here, so that nothing of ours is in the way; else the
// file that we serve. One whose index others made is not read behind our back
// before it is proven.
func (f *faces) device(l *fetch.Handle) (string, error) {
	if l.Whole() && !l.About().Unproven {
		return l.Path(), nil
	}
	return f.serve(dataName(l.Key), l.Layer)
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
		f.served = s
	}
	f.data.Add(name, data)
	return filepath.Join(dir, name), nil
}

func (f *faces) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lowers { // of mounts that somebody is still in
		l.face.Unmount(true)
		os.Remove(l.dir)
	}
	if f.served == nil {
		return
	}
	if err := f.served.Unmount(false); err != nil {
		f.served.Unmount(true) // a lazily unmounted tree still has its devices open
	}
}

// tryKernel mounts an image of one small file over a data file that we serve,
// and has another process read it: this one must not touch its own mounts.
func (f *faces) tryKernel() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting EROFS needs root")
	}
	dir, err := os.MkdirTemp(f.d.dirs.Run, "probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	content := bytes.Repeat([]byte("varve"), 1000)
	entry := index.Entry{Name: "probe", Mode: 0o100644, Size: int64(len(content))}
	t, err := index.Merge([][]index.Entry{{entry}})
	if err != nil {
		return err
	}
	var img bytes.Buffer
	p := &probeData{size: 2 * index.BlockSize}
	if err := t.WriteTo(&img, []index.Device{{Tag: "probe", Size: p.size}}); err != nil {
		return err
	}
	// A data file is whole blocks: the kernel takes a short read for an error.
	data := append(bytes.Clone(content), make([]byte, p.size-int64(len(content)))...)
	for name, b := range map[string][]byte{"index": img.Bytes(), "data": data} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	if p.file, err = os.Open(filepath.Join(dir, "data")); err != nil {
		return err
	}
	defer p.file.Close()
	served := filepath.Join(dir, "served")
	if err := os.Mkdir(served, 0o700); err != nil {
		return err
	}
	o := fs.Options{Metrics: f.d.m, Log: f.d.log, Private: true}
	files := fs.NewDataFiles(o, func(string, int64, error) {})
	files.Add("probe", p)
	s, err := fs.Serve(served, files, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Unmount(false)) }()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return err
	}
	k, err := fs.MountKernel(mnt, filepath.Join(dir, "index"), []string{filepath.Join(served, "probe")}, fs.Options{})
	if err != nil {
		return err
	}
	out, err := exec.Command("cat", filepath.Join(mnt, "probe")).Output()
	if err != nil {
		err = fmt.Errorf("EROFS cannot read through FUSE: %w", err)
	}
	if uerr := k.Unmount(false); uerr != nil {
		err = errors.Join(err, uerr, k.Unmount(true))
	}
	if err == nil && !bytes.Equal(out, content) {
		err = errors.New("EROFS read wrong bytes through FUSE")
	}
	return err
}

// probeData is the data file of the probe, which is all there.
type probeData struct {
	file *os.File
	size int64
}

func (p *probeData) Hold(int64, int64) error { return nil }
func (p *probeData) Release()                {}
func (p *probeData) Fd() int                 { return int(p.file.Fd()) }
func (p *probeData) Size() int64             { return p.size }
