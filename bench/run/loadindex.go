package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/index"
	"github.com/varvefs/varve/index/soci"
)

const (
	loadTarget  = 150 * time.Millisecond // to load the index of the image of many files
	againTarget = 5 * time.Millisecond   // to mount it once more
)

// loaded is how long each part of loading took, and the CPU of all, collections of
// garbage included.
type loaded struct{ read, rest, merge, write, cpu time.Duration }

func (l loaded) all() time.Duration { return l.read + l.rest + l.merge + l.write }

// loadIndexes loads the indexes of the image of many files in this process, without
// a network.
func (b *bench) loadIndexes(ctx context.Context, x *daemon.Indexed, out *section) error {
	n := b.turns(11)
	out.line("")
	out.line("**Loading** the index of an image of %d files in %d layers, without the network: the bytes of its layers' indexes are in memory, and what comes out is the merged index in a file, not synced. The layers one after the other (a mount reads them side by side), all in one goroutine; memory is given back to the system before each turn. *read*: `index.ReadBundle` or `soci.Read`; *rest*: `index.WithRest`, which SOCI's has in it; *merge*: `index.Merge`; *write*: `Tree.WriteTo`. Medians of n=%d, in turns. Target: under %d ms.", manyFilesCount, len(trees), n, loadTarget.Milliseconds())
	out.line("")
	out.line("| index | MB | read ms | rest ms | merge ms | write ms | all ms | least | target | CPU ms |")
	out.line("|---|--:|--:|--:|--:|--:|--:|--:|---|--:|")
	kinds := []string{fetch.KindBundle, fetch.KindSOCI}
	docs, got := map[string][]document{}, map[string][]loaded{}
	for _, kind := range kinds {
		var err error
		if docs[kind], err = b.documents(ctx, repoIndexed+manyFiles, x, kind); err != nil {
			return err
		}
	}
	for i := range n {
		for _, kind := range turn(kinds, i) {
			debug.FreeOSMemory()
			before, err := ownCPU()
			if err != nil {
				return err
			}
			l, err := b.load(kind, docs[kind])
			if err != nil {
				return fmt.Errorf("load the %s index: %w", kind, err)
			}
			after, err := ownCPU()
			if err != nil {
				return err
			}
			l.cpu = after - before
			got[kind] = append(got[kind], l)
		}
	}
	for _, kind := range kinds {
		v := got[kind]
		part := func(f func(loaded) time.Duration) string { return ms(median(pickFrom(v, f))) }
		var size int64
		for _, d := range docs[kind] {
			size += int64(len(d.raw))
		}
		whole := pickFrom(v, loaded.all)
		out.line("| %s | %s | %s | %s | %s | %s | %s | %s | < %d %s | %s |", kind, mb(size), part(func(l loaded) time.Duration { return l.read }),
			part(func(l loaded) time.Duration { return l.rest }), part(func(l loaded) time.Duration { return l.merge }),
			part(func(l loaded) time.Duration { return l.write }), ms(median(whole)), ms(lowest(whole)), loadTarget.Milliseconds(), verdict(float64(median(whole)), float64(loadTarget)),
			part(func(l loaded) time.Duration { return l.cpu }))
		b.say("load %s: ms %s", kind, all(whole, ms))
	}
	return nil
}

// document is a layer's index as the registry has it.
type document struct {
	raw  []byte
	size int64 // of the layer's blob
}

// documents gives the indexes of a kind that were pushed for the layers of a
// repository's image, lowest first.
func (b *bench) documents(ctx context.Context, repo string, x *daemon.Indexed, kind string) (out []document, err error) {
	img, err := b.pushed(ctx, repo, x, kind)
	if err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	if len(layers) != len(x.Layers) {
		return nil, fmt.Errorf("an index of %d layers for an image of %d", len(layers), len(x.Layers))
	}
	for i, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		raw, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
		out = append(out, document{raw, x.Layers[i].Size})
	}
	return out, nil
}

// load reads the indexes of layers and writes the merged one.
func (b *bench) load(kind string, docs []document) (l loaded, err error) {
	start := time.Now()
	lap := func(sum *time.Duration) {
		now := time.Now()
		*sum += now.Sub(start)
		start = now
	}
	var entries [][]index.Entry
	var devices []index.Device
	for i, d := range docs {
		var layer index.Layer
		if kind == fetch.KindSOCI {
			z, err := soci.Read(d.raw, d.size)
			if err != nil {
				return l, err
			}
			layer = z.Layer
			lap(&l.read)
		} else {
			x, err := index.ReadBundle(d.raw)
			if err != nil {
				return l, err
			}
			layer = x.Layer
			lap(&l.read)
			if layer.Frames, err = index.WithRest(x.Frames, x.Points, x.Uncompressed); err != nil {
				return l, err
			}
			lap(&l.rest)
		}
		_, _, size := layer.Frames.Len()
		entries, devices = append(entries, layer.Entries), append(devices, index.Device{Tag: fmt.Sprint(i), Size: size})
	}
	t, err := index.Merge(entries)
	if err != nil {
		return l, err
	}
	lap(&l.merge)
	f, err := os.Create(filepath.Join(b.dir, "merged.erofs"))
	if err != nil {
		return l, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := errors.Join(t.WriteTo(w, devices), w.Flush()); err != nil {
		return l, err
	}
	lap(&l.write)
	return l, nil
}

// firstAndAgain holds the times of mounts of the image of many files.
type firstAndAgain struct {
	first, daemon, cpu, network []time.Duration
	again, restarted            []time.Duration
}

// mountIndexed mounts the image of many files by its pushed index.
func (b *bench) mountIndexed(ctx context.Context, w *wire, out *section) error {
	out.line("")
	out.line("**Mounting it** by the varve index, link without delay. *first*: by a new daemon on an empty store, from the request until the mount answers, with all that the daemon keeps on disk, synced where it syncs; *network*: the same requests made again by a bare client, one after the other; *less network*: the difference. *again*: once more after an unmount; *restarted*: the first mount of a daemon that was started anew on the store. Medians of n=%d. Targets: first less network under %d ms, again under %d ms.", b.n, loadTarget.Milliseconds(), againTarget.Milliseconds())
	out.line("")
	out.line("| face | files | first ms | least | daemon's own ms | its CPU ms | network ms | less network ms | target | again ms | least | target | restarted ms | least | requests at first |")
	out.line("|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|---|--:|--:|---|")
	got := map[string]*firstAndAgain{}
	said, files := map[string]string{}, uint64(0)
	for i := range b.n {
		for _, face := range turn(faces, i) {
			if got[face] == nil {
				got[face] = &firstAndAgain{}
			}
			var err error
			if said[face], files, err = b.mountManyFiles(ctx, w, face, got[face]); err != nil {
				return fmt.Errorf("%s face: %w", face, err)
			}
		}
	}
	for _, face := range faces {
		t := got[face]
		var less []time.Duration
		for i, f := range t.first {
			less = append(less, f-t.network[i])
		}
		out.line("| %s | %d | %s | %s | %s | %s | %s | %s | < %d %s | %s | %s | < %d %s | %s | %s | %s |", face, files, ms(median(t.first)), ms(lowest(t.first)), ms(median(t.daemon)),
			ms(median(t.cpu)), ms(median(t.network)), ms(median(less)), loadTarget.Milliseconds(), verdict(float64(median(less)), float64(loadTarget)),
			ms(median(t.again)), ms(lowest(t.again)), againTarget.Milliseconds(), verdict(float64(median(t.again)), float64(againTarget)),
			ms(median(t.restarted)), ms(lowest(t.restarted)), said[face])
		b.say("many files, %s: first ms %s; network %s; again %s; restarted %s", face, all(t.first, ms), all(t.network, ms), all(t.again, ms), all(t.restarted, ms))
	}
	return nil
}

func (b *bench) mountManyFiles(ctx context.Context, w *wire, face string, t *firstAndAgain) (requests string, files uint64, err error) {
	s, err := b.fresh(ctx, "manyfiles")
	if err != nil {
		return "", 0, err
	}
	defer func() { err = errors.Join(err, s.discard()) }()
	mount := func() (time.Duration, error) {
		o := daemon.ImageOptions{Image: w.ref(repoIndexed+manyFiles, tagPlain), Insecure: true}
		start := time.Now()
		m, err := s.client.Mount(ctx, daemon.MountOptions{ImageOptions: o, Face: face, Name: "m", Wait: true})
		took := time.Since(start)
		if err != nil {
			return 0, err
		}
		files = m.Files
		for _, l := range m.Layers {
			if l.Index != fetch.KindBundle {
				err = fmt.Errorf("layer %.19s is read by %q (%s)", l.Digest, l.Index, l.Reason)
			}
		}
		return took, errors.Join(err, s.unmount(ctx))
	}
	w.reset()
	before, err := s.cpu()
	if err != nil {
		return "", 0, err
	}
	first, err := mount()
	if err != nil {
		return "", 0, err
	}
	after, err := s.cpu()
	if err != nil {
		return "", 0, err
	}
	log := w.rec.Requests()
	requests = w.requests()
	dur, err := s.lastDur()
	if err != nil {
		return "", 0, err
	}
	network, err := replay(ctx, w.link.Addr(), log)
	if err != nil {
		return "", 0, err
	}
	again, err := mount()
	if err != nil {
		return "", 0, err
	}
	if err := s.stop(); err != nil {
		return "", 0, err
	}
	if s, err = s.again(ctx); err != nil {
		return "", 0, err
	}
	restarted, err := mount()
	if err != nil {
		return "", 0, err
	}
	t.first, t.daemon, t.cpu = append(t.first, first), append(t.daemon, dur), append(t.cpu, after-before)
	t.network = append(t.network, network)
	t.again, t.restarted = append(t.again, again), append(t.restarted, restarted)
	return requests, files, nil
}

// replay makes requests once more, one after the other over a connection of their
// own, and says how long that takes.
func replay(ctx context.Context, host string, log []link.Request) (time.Duration, error) {
	c := http.Client{Transport: &http.Transport{DisableCompression: true}}
	defer c.CloseIdleConnections()
	start := time.Now()
	for _, r := range log {
		req, err := http.NewRequestWithContext(ctx, r.Method, "http://"+host+r.Path, nil)
		if err != nil {
			return 0, err
		}
		if r.Range != "" {
			req.Header.Set("Range", r.Range)
		}
		// Without it a registry gives manifests of an old kind.
		req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*")
		resp, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}
