package main

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/varvefs/varve/bench/forms"
)

// idleImages makes sure that the registry holds the idle images and names them.
func (b *bench) idleImages(ctx context.Context, sharing string) (refs []string, err error) {
	repo, base := "idle/own", 0
	if sharing == sharedBase {
		repo, base = "idle/shared", idleShared
	}
	start := time.Now()
	dir, err := os.MkdirTemp(b.dir, "idle-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	pause := filepath.Join(dir, "pause")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", pause, "./bench/run/pause")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := output(build); err != nil {
		return nil, err
	}
	program, err := os.ReadFile(pause)
	if err != nil {
		return nil, err
	}
	for i := range idleCount {
		t := target{fmt.Sprintf("%s-%02d", repo, i), tagEStargz}
		refs = append(refs, b.named(t))
		if b.there(ctx, t) {
			continue
		}
		var layers []forms.Opener
		for j := range idleLayers {
			seed := [32]byte{byte(j), byte(i + 1), byte(base)}
			if j < base {
				seed[1] = 0
			}
			layers = append(layers, func() (io.ReadCloser, error) {
				return stream(func(w io.Writer) error { return idleLayer(w, j, seed, program) }), nil
			})
		}
		img, err := forms.FromLayers(ctx, forms.EStargz, forms.Options{Dir: dir, Level: 1}, layers...)
		if err != nil {
			return nil, err
		}
		if err := forms.Push(ctx, img, b.named(t)); err != nil {
			return nil, err
		}
	}
	b.say("images %s in %s", sharing, time.Since(start).Round(time.Second))
	return refs, nil
}

// idleLayer writes the tar of a layer: a directory of small files of noise, and in
// the lowest one the program.
func idleLayer(w io.Writer, number int, seed [32]byte, program []byte) error {
	noise := rand.NewChaCha8(seed)
	sizes := rand.New(noise)
	out := tar.NewWriter(w)
	put := func(name string, mode int64, text []byte) error {
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(text))}); err != nil {
			return err
		}
		_, err := out.Write(text)
		return err
	}
	dir := fmt.Sprintf("layer-%d/", number)
	if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
		return err
	}
	for i := range 40 {
		text := make([]byte, 1<<10+sizes.IntN(8<<10))
		noise.Read(text)
		if err := put(fmt.Sprintf("%sfile-%d", dir, i), 0o644, text); err != nil {
			return err
		}
	}
	if number == 0 {
		if err := put("pause", 0o755, program); err != nil {
			return err
		}
	}
	return out.Close()
}
