package fs

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/metrics"
)

// aheadData is a data file that says itself whether it is whole.
type aheadData struct {
	testData
	whole bool
}

func (d aheadData) Whole() bool { return d.whole }

// aheadTest is an image that the test serves, and so must not touch: children do.
type aheadTest struct {
	*testing.T
	dir string
	reg *prometheus.Registry
}

// newAheadTest mounts an image. Where far says so all is said to be here.
func newAheadTest(t *testing.T, files []lowerFile, far, whole bool) *aheadTest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		t.Skip("needs " + fuseDevice)
	}
	indexPath, dataPath := writeLower(t, t.TempDir(), files)
	im, err := index.Open(indexPath)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dataPath)
	if err != nil {
		t.Fatal(err)
	}
	m := &aheadTest{t, t.TempDir(), prometheus.NewRegistry()}
	o := Options{
		Metrics: metrics.New(m.reg), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Xattrs: true,
		Fault: func(device int, off int64, err error) { t.Errorf("device %d at %d: %v", device, off, err) },
	}
	served, err := Serve(m.dir, NewTree(im, []Data{aheadData{testData{f: f}, whole}}, o), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unbusy(ErrBusy, func() error { return served.Unmount(false) }); err != nil {
			t.Error(err, served.Unmount(true))
			return
		}
		if err := errors.Join(im.Close(), f.Close()); err != nil {
			t.Error(err)
		}
	})
	if far {
		served.ReadFar()
	}
	return m
}

// run runs a shell's commands in the mount and gives what they print.
func (m *aheadTest) run(script string) []byte {
	m.Helper()
	var said bytes.Buffer
	// Not by cmd.Dir: between fork and exec the test would touch its mount.
	cmd := exec.Command("/bin/bash", "-c", `cd "$0" && eval "$1"`, m.dir, script)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil || said.Len() > 0 {
		m.Fatalf("%s: %v: %s", script, err, said.Bytes())
	}
	return out
}

// reads gives how many READs were answered.
func (m *aheadTest) reads() (n uint64) {
	m.Helper()
	families, err := m.reg.Gather()
	if err != nil {
		m.Fatal(err)
	}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			if l := s.GetLabel(); len(l) > 0 && l[0].GetName() == "op" && l[0].GetValue() == "read" {
				n += s.GetHistogram().GetSampleCount()
			}
		}
	}
	return n
}

// want runs a script that prints want, and must take so many READs.
func (m *aheadTest) want(script string, want []byte, reads uint64) {
	m.Helper()
	if got := m.run(script); !bytes.Equal(got, want) {
		m.Errorf("%s prints %d bytes, not the %d that are there", script, len(got), len(want))
	}
	if n := m.reads(); n != reads {
		m.Errorf("%s: %d READs, want %d", script, n, reads)
	}
}

// row gives so many small files of a directory, d/0000 and so on, with between
// them what has no contents, and the contents of them all.
func row(count int) (files []lowerFile, all []byte) {
	files = append(files, lowerFile{Entry: directory("d")})
	for i := range count {
		name := fmt.Sprintf("d/%04d", i)
		f := lowerFile{Entry: regular(name, 0, 0), content: fmt.Sprintf("%d of %d", i, count)}
		if i%7 == 3 {
			f.content += string(make([]byte, 5000+i))
			f.Xattrs = []index.Xattr{{Name: "user.long", Value: make([]byte, i)}}
		}
		all = append(all, f.content...)
		files = append(files, f)
		switch i % 11 {
		case 1:
			files = append(files, lowerFile{Entry: regular(name+"-empty", 0, 0)})
		case 2:
			files = append(files, lowerFile{Entry: index.Entry{Name: name + "-link", Mode: unix.S_IFLNK | 0o777, Link: fmt.Sprintf("%04d", i)}})
		case 3:
			files = append(files, lowerFile{Entry: directory(name + "-sub")})
		}
	}
	return files, all
}

func TestAhead(t *testing.T) {
	const count = 300
	files, all := row(count)
	every := "cat d/????"
	t.Run("in order", func(t *testing.T) {
		// The first, the second, and those at which windows of 8, 16, 32, 64 and 128 end.
		newAheadTest(t, files, true, true).want(every, all, 7)
	})
	t.Run("not all here", func(t *testing.T) {
		newAheadTest(t, files, false, true).want(every, all, count)
	})
	t.Run("dropped", func(t *testing.T) {
		newAheadTest(t, files, true, false).want(every, all, count)
	})
	t.Run("not known", func(t *testing.T) {
		newAheadTest(t, files, true, true).want("for i in {0000..0299}; do printf d/$i'\\0'; done | xargs -0 cat", all, count)
	})
	t.Run("again", func(t *testing.T) {
		m := newAheadTest(t, files, true, true)
		m.run("cat d/00?? >/dev/null")
		m.run("for f in d/*; do test -d $f || dd if=$f iflag=nocache count=0 status=none; done")
		m.run("cat d/00?? >/dev/null")
		if n := m.reads(); n != 10 {
			t.Errorf("%d READs, want 5 each time", n)
		}
	})
	t.Run("every second", func(t *testing.T) {
		m := newAheadTest(t, files, true, true)
		m.run("cat d/???[02468] >/dev/null")
		if n := m.reads(); n != count/2 {
			t.Errorf("%d READs, want %d", n, count/2)
		}
	})
}

// TestAheadTree reads a tree as programs do, with files of all sizes.
func TestAheadTree(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	src := t.TempDir()
	var files []lowerFile
	count := uint64(0)
	var fill func(dir string, depth int)
	fill = func(dir string, depth int) {
		for i := range 12 {
			name := fmt.Sprintf("%s%02d", dir, i)
			if depth > 0 && i%4 == 1 {
				files = append(files, lowerFile{Entry: directory(name)})
				if err := os.Mkdir(filepath.Join(src, name), 0o755); err != nil {
					t.Fatal(err)
				}
				fill(name+"/", depth-1)
				continue
			}
			content := make([]byte, 1<<r.IntN(14)+r.IntN(5000))
			switch r.IntN(40) {
			case 0: // more than is given
				content = make([]byte, aheadSmall+r.IntN(300<<10))
			case 1: // more than is copied
				content = make([]byte, small+r.IntN(aheadSmall-small))
			}
			for k := range content {
				content[k] = byte(r.Uint32())
			}
			count++
			files = append(files, lowerFile{Entry: regular(name, 0, 0), content: string(content)})
			if err := os.WriteFile(filepath.Join(src, name), content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	fill("", 3)
	r.Shuffle(len(files), func(i, j int) {
		if files[i].IsRegular() && files[j].IsRegular() {
			files[i], files[j] = files[j], files[i] // other than in the tree's order
		}
	})
	m := newAheadTest(t, files, true, true)
	// Two at a time meet what the other is reading.
	m.run(fmt.Sprintf("find . -type f | sort > %[1]s-list; (tar -cf - . | wc -c) & (tac %[1]s-list | xargs cat | wc -c) & diff -r . %[1]s; wait", src))
	m = newAheadTest(t, files, true, true)
	m.run("diff -r . " + src)
	if n := m.reads(); n >= count {
		t.Errorf("%d READs of %d files", n, count)
	}
}
