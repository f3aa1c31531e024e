package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/index"
)

// A probe's directory, in the runtime directory, and what is mounted in it.
const (
	probePrefix  = "probe-"
	probeServed  = "served"
	probeMounted = "mnt"
)

// tryKernel mounts an image of one small file over a data file that we serve,
// and has another process read it: this one must not touch its own mounts.
func (f *faces) tryKernel() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting EROFS needs root")
	}
	dir, err := os.MkdirTemp(f.d.dirs.Run, probePrefix)
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
	served := filepath.Join(dir, probeServed)
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
	defer func() { f.end(s) }()
	mnt := filepath.Join(dir, probeMounted)
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
	f.end(k)
	if err == nil && !bytes.Equal(out, content) {
		err = errors.New("EROFS read wrong bytes through FUSE")
	}
	return err
}

// end takes a mount of the probe away. Who looks at all mounts of the machine may
// keep it busy, which says nothing of the kernel.
func (f *faces) end(m face) {
	if err := m.Unmount(false); err != nil {
		if err := m.Unmount(true); err != nil {
			f.d.log.Warn("a mount of the probe stays", "err", err)
		}
	}
}

// probeData is the data file of the probe, which is all there, and read as one that
// is not.
type probeData struct {
	file *os.File
	size int64
}

func (p *probeData) Hold(int64, int64) error { return nil }
func (p *probeData) HoldFirst(_, _ int64, wanted bool) (bool, error) {
	return wanted, nil
}
func (p *probeData) Release()    {}
func (p *probeData) Fd() int     { return int(p.file.Fd()) }
func (p *probeData) Size() int64 { return p.size }

// endProbe takes away what a daemon has left that was killed over its probe.
func endProbe(dir string) error {
	return errors.Join(fs.Detach(filepath.Join(dir, probeMounted)), fs.Detach(filepath.Join(dir, probeServed)), os.RemoveAll(dir))
}
