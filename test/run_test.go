package test

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varvefs/varve/bench/forms"
)

// programs is an image with programs in it, and a tree for them to read.
func programs(t *testing.T) ([]byte, []string) {
	l := newLayer(t)
	bin, err := os.ReadFile(child)
	must(t, err)
	l.dir("bin", "files")
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/child", Mode: 0o755}, bin)
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/script", Mode: 0o755}, []byte("#!/bin/sh\nset -e\nhere=$(dirname \"$0\")\ncat \"$here/../files/0\"\nexec \"$here/child\" sum \"$here/child\"\n"))
	var names []string
	for i := range 64 {
		name := "files/" + string(rune('0'+i))
		names = append(names, name)
		l.file(name, content(name, 20_000+i*1000))
	}
	l.file("files.map", content("files.map", 9<<20+5))
	return l.bytes(), names
}

func TestPrograms(t *testing.T) {
	needRoot(t)
	layer, names := programs(t)
	bin, err := os.ReadFile(child)
	must(t, err)
	for _, form := range []forms.Form{forms.EStargz, forms.ZstdChunkedContainers, forms.Gzip} {
		for _, face := range faces {
			t.Run(string(form)+"/"+face, func(t *testing.T) {
				_, ref := serve(t, form, layer)
				h := newHost(t)
				dir := h.ok("mount", "--face", face, ref)
				run := func(name string, args ...string) string {
					t.Helper()
					out, err := fromMount(filepath.Join(dir, name), args...).Output()
					if err != nil {
						t.Fatalf("%s %v: %v: %s", name, args, err, stderrOf(err))
					}
					return string(out)
				}
				// A shell script and a Go program, run from the mount, cold.
				want := string(content("files/0", 20_000)) + sumOf(bin) + "\n"
				if got := run("bin/script"); got != want {
					t.Errorf("the script gave %d bytes, want %d", len(got), len(want))
				}
				// Pages of a mapping, from the last to the first.
				if got := run("bin/child", "mmap", filepath.Join(dir, "files.map")); strings.TrimSpace(got) != sumOf(content("files.map", 9<<20+5)) {
					t.Errorf("mmap: digest %s", got)
				}
				// Many goroutines under a hail of signals, on cold files; the
				// same program on the same files from a disk is the oracle.
				plain := t.TempDir()
				must(t, os.Mkdir(filepath.Join(plain, "files"), 0o755))
				for i, name := range names {
					must(t, os.WriteFile(filepath.Join(plain, name), content(name, 20_000+i*1000), 0o644))
				}
				if got, want := run("bin/child", "storm", filepath.Join(dir, "files")), helper(t, "storm", filepath.Join(plain, "files")); strings.TrimSpace(got) != want {
					t.Errorf("storm: %s, want %s", got, want)
				}
				// What is written is refused.
				if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); err == nil || !strings.Contains(err.Error(), "read-only") {
					t.Errorf("a write: %v", err)
				}
				if strings.Contains(h.logText(), "level=ERROR") {
					t.Error("the daemon logged an error")
				}
				h.ok("umount", dir)
			})
		}
	}
}

// TestSetuid mounts with and without honouring what the image says of users and
// devices.
func TestSetuid(t *testing.T) {
	needRoot(t)
	l := newLayer(t)
	l.add(tar.Header{Typeflag: tar.TypeChar, Name: "zero", Devmajor: 1, Devminor: 5, Mode: 0o666}, nil)
	_, ref := serve(t, forms.Tar, l.bytes())
	for _, face := range faces {
		t.Run(face, func(t *testing.T) {
			h := newHost(t)
			dir := h.ok("mount", "--face", face, ref)
			if f, err := os.Open(filepath.Join(dir, "zero")); err == nil {
				f.Close()
				t.Error("a device of the image can be opened")
			}
			h.ok("umount", dir)
			dir = h.ok("mount", "--face", face, "--setuid", ref)
			f, err := os.Open(filepath.Join(dir, "zero"))
			must(t, err)
			f.Close()
			for _, line := range h.mounts() {
				if strings.Fields(line)[4] == dir && (strings.Contains(line, "nosuid") || strings.Contains(line, "nodev")) {
					t.Errorf("--setuid: %s", line)
				}
			}
			h.ok("umount", dir)
		})
	}
}
