package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/varvefs/varve/daemon"
)

// images has the images that it was given, and a directory for each chain that is
// mounted.
type images struct {
	dir    string
	layers map[string][]daemon.LayerID // by manifest

	mu      sync.Mutex // guards what follows
	mounts  int        // how often a chain was mounted that was not
	mounted map[daemon.Chain]bool
	gone    []daemon.Chain
	swept   [][]daemon.Chain // what was left, each time
	err     error            // of Mount
}

func (im *images) Layers(_ context.Context, of daemon.ImageRef) ([]daemon.LayerID, error) {
	if ls, ok := im.layers[of.Manifest]; ok {
		return ls, nil
	}
	return nil, errors.New("there is no such image")
}

func (im *images) Mount(_ context.Context, c daemon.Chain) (string, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.err != nil {
		return "", im.err
	}
	if !im.mounted[c] {
		im.mounts++
		im.mounted[c] = true
	}
	dir := filepath.Join(im.dir, fmt.Sprintf("%s-%d", digest.Digest(c.Manifest).Encoded()[:8], c.Layers))
	return dir, os.MkdirAll(dir, 0o755)
}

func (im *images) Unmount(_ context.Context, stay map[daemon.Chain]bool) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	maps.DeleteFunc(im.mounted, func(c daemon.Chain, _ bool) bool { return !stay[c] })
	return nil
}

func (im *images) Usage(_ context.Context, c daemon.Chain) (int64, error) {
	return int64(1000 * c.Layers), nil
}

func (im *images) Forget(_ context.Context, gone daemon.Chain, left []daemon.Chain) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if !slices.Contains(left, gone) {
		im.gone = append(im.gone, gone)
	}
	return nil
}

func (im *images) Sweep(_ context.Context, left []daemon.Chain) (again bool, err error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.swept = append(im.swept, left)
	return false, nil
}

func (im *images) lastSwept() []daemon.Chain {
	im.mu.Lock()
	defer im.mu.Unlock()
	if len(im.swept) == 0 {
		return nil
	}
	return im.swept[len(im.swept)-1]
}

func (im *images) up() (all []daemon.Chain) {
	im.mu.Lock()
	defer im.mu.Unlock()
	return slices.Collect(maps.Keys(im.mounted))
}

// fixture is a snapshotter and an image of three layers.
type fixture struct {
	*Snapshotter
	t      *testing.T
	images *images
	image  daemon.ImageRef
	chains []string // chain IDs
}

func newFixture(t *testing.T, linger time.Duration) *fixture {
	needRoot(t)
	of, layers, chains := fakeImage("app", "a", "b", "c")
	f := &fixture{t: t, image: of, chains: chains, images: &images{dir: t.TempDir(), mounted: map[daemon.Chain]bool{}, layers: map[string][]daemon.LayerID{of.Manifest: layers}}}
	f.open(t.TempDir(), linger)
	return f
}

func (f *fixture) open(root string, linger time.Duration) {
	s, err := New(Config{Root: root, Images: f.images, Log: slog.New(slog.DiscardHandler), Fell: prometheus.NewCounter(prometheus.CounterOpts{}), Linger: linger})
	if err != nil {
		f.t.Fatal(err)
	}
	f.Snapshotter = s
	f.t.Cleanup(func() { s.Close() })
}

// fakeImage gives an image whose layers have these contents.
func fakeImage(name string, contents ...string) (daemon.ImageRef, []daemon.LayerID, []string) {
	var layers []daemon.LayerID
	var ids []digest.Digest
	for _, c := range contents {
		id := digest.FromString("tar of " + c)
		layers = append(layers, daemon.LayerID{Digest: digest.FromString("blob of " + c).String(), DiffID: id.String()})
		ids = append(ids, id)
	}
	var chains []string
	for _, c := range identity.ChainIDs(ids) {
		chains = append(chains, c.String())
	}
	return daemon.ImageRef{Name: "example.org/" + name + ":1", Manifest: digest.FromString(name).String()}, layers, chains
}

// labelsOf gives the labels with which clients pull the layer of a chain.
func (f *fixture) labelsOf(of daemon.ImageRef, layer, chain string) map[string]string {
	return map[string]string{
		snapshots.LabelSnapshotRef: chain, snapshotters.TargetRefLabel: of.Name,
		snapshotters.TargetManifestDigestLabel: of.Manifest, snapshotters.TargetLayerDigestLabel: layer,
	}
}

// pull prepares the first n layers, as clients do.
func (f *fixture) pull(of daemon.ImageRef, chains []string, n int) {
	f.t.Helper()
	parent := ""
	for i := range n {
		key := fmt.Sprintf("extract-%d %s", time.Now().UnixNano(), chains[i])
		_, err := f.Prepare(f.t.Context(), key, parent, snapshots.WithLabels(f.labelsOf(of, f.images.layers[of.Manifest][i].Digest, chains[i])))
		if !errdefs.IsAlreadyExists(err) {
			f.t.Fatalf("layer %d: %v, want that it exists already", i, err)
		}
		info, err := f.Stat(f.t.Context(), chains[i])
		if err != nil || info.Kind != snapshots.KindCommitted || info.Parent != parent || info.Labels[snapshots.LabelSnapshotRef] != chains[i] {
			f.t.Fatalf("layer %d: %+v, %v", i, info, err)
		}
		if _, err := f.Stat(f.t.Context(), key); !errdefs.IsNotFound(err) {
			f.t.Fatalf("what layer %d was prepared as stays: %v", i, err)
		}
		parent = chains[i]
	}
}

func (f *fixture) prepare(key, parent string) []mount.Mount {
	f.t.Helper()
	m, err := f.Prepare(f.t.Context(), key, parent)
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *fixture) remove(keys ...string) {
	f.t.Helper()
	for _, k := range keys {
		if err := f.Remove(f.t.Context(), k); err != nil {
			f.t.Fatal(err)
		}
	}
}

// option gives the value of an overlayfs mount's option.
func option(t *testing.T, ms []mount.Mount, name string) string {
	t.Helper()
	if len(ms) != 1 || ms[0].Type != "overlay" {
		t.Fatalf("mounts %v, want one of overlayfs", ms)
	}
	for _, o := range ms[0].Options {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			return v
		}
	}
	return ""
}

// TestRemote pulls an image and starts containers on it.
func TestRemote(t *testing.T) {
	f := newFixture(t, time.Hour)
	f.pull(f.image, f.chains, 3)
	if n := len(f.images.up()); n != 0 {
		t.Fatalf("%d chains are mounted before a container is there", n)
	}
	whole := daemon.Chain{ImageRef: f.image, Layers: 3}
	lower := filepath.Join(f.images.dir, digest.Digest(f.image.Manifest).Encoded()[:8]+"-3")
	for _, key := range []string{"one", "two"} {
		m := f.prepare(key, f.chains[2])
		if got := option(t, m, "lowerdir"); got != lower {
			t.Errorf("lowerdir %s, want %s", got, lower)
		}
		if option(t, m, "upperdir") == "" || option(t, m, "workdir") == "" {
			t.Errorf("mounts %v cannot be written", m)
		}
		again, err := f.Mounts(t.Context(), key)
		if err != nil || !slices.EqualFunc(m, again, func(a, b mount.Mount) bool { return slices.Equal(a.Options, b.Options) }) {
			t.Errorf("mounts %v, then %v, %v", m, again, err)
		}
	}
	if f.images.mounts != 1 {
		t.Errorf("it was mounted %d times", f.images.mounts)
	}
	m, err := f.View(t.Context(), "view", f.chains[2])
	if err != nil {
		t.Fatal(err)
	}
	if len(m) != 1 || m[0].Type != "bind" || m[0].Source != lower || !slices.Contains(m[0].Options, "ro") {
		t.Errorf("a view is %v", m)
	}
	mounted(t, m, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err == nil {
			t.Error("a view can be written")
		}
	})
	if u, err := f.Usage(t.Context(), f.chains[1]); err != nil || u.Size != 2000 {
		t.Errorf("usage %+v, %v", u, err)
	}
	f.remove("one", "two", "view")
	if up := f.images.up(); !slices.Equal(up, []daemon.Chain{whole}) {
		t.Errorf("mounted after the last container: %v", up)
	}
	f.remove(f.chains[2], f.chains[1], f.chains[0])
	if up := f.images.up(); len(up) != 0 {
		t.Errorf("mounted after the image has gone: %v", up)
	}
	if want := []daemon.Chain{{ImageRef: f.image, Layers: 3}, {ImageRef: f.image, Layers: 2}, {ImageRef: f.image, Layers: 1}}; !slices.Equal(f.images.gone, want) {
		t.Errorf("forgotten: %v, want %v", f.images.gone, want)
	}
	if left, _ := os.ReadDir(filepath.Join(f.root, "snapshots")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// mounted has f look at what is mounted somewhere for the time.
func mounted(t *testing.T, m []mount.Mount, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(m, dir); err != nil {
		t.Fatal(err)
	}
	defer mount.UnmountAll(dir, 0)
	f(dir)
}

// leads reports whether a name beside other snapshots leads to a directory.
func leads(name, dir string) bool {
	to, err := os.Readlink(name)
	return err == nil && to == dir
}

// TestMixed has a layer unpacked on remote ones, and a remote one asked for above
// that.
func TestMixed(t *testing.T) {
	f := newFixture(t, time.Hour)
	f.pull(f.image, f.chains, 2)
	m := f.prepare("extract", f.chains[1])
	lower := option(t, m, "lowerdir")
	if filepath.Base(lower) != digest.Digest(f.image.Manifest).Encoded()[:8]+"-2" {
		t.Errorf("lowerdir %s", lower)
	}
	if err := os.WriteFile(filepath.Join(lower, "below"), []byte("below"), 0o644); err != nil {
		t.Fatal(err)
	}
	mounted(t, m, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "above"), []byte("above"), 0o644); err != nil {
			t.Error(err)
		}
	})
	if err := f.Commit(t.Context(), "unpacked", "extract"); err != nil {
		t.Fatal(err)
	}
	// What lies on it cannot be remote: its image's chain is not all there is.
	m, err := f.Prepare(t.Context(), "extract again", "unpacked", snapshots.WithLabels(f.labelsOf(f.image, f.images.layers[f.image.Manifest][2].Digest, f.chains[2])))
	if err != nil {
		t.Fatal(err)
	}
	if dirs := strings.Split(option(t, m, "lowerdir"), ":"); len(dirs) != 2 || !leads(dirs[1], lower) {
		t.Errorf("lowerdir %v", dirs)
	}
	mounted(t, m, func(dir string) {
		for _, name := range []string{"above", "below"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != name {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
	})
	v, err := f.View(t.Context(), "view", "unpacked")
	if err != nil {
		t.Fatal(err)
	}
	if dirs := strings.Split(option(t, v, "lowerdir"), ":"); len(dirs) != 2 || !leads(dirs[1], lower) {
		t.Errorf("a view's lowerdir %v", dirs)
	}
}

// TestNotRemote has what is no layer of an image that can be mounted unpacked, as any
// other.
func TestNotRemote(t *testing.T) {
	f := newFixture(t, time.Hour)
	other, layers, chains := fakeImage("other", "x", "b")
	f.images.layers[other.Manifest] = layers
	f.pull(other, chains, 1)
	unknown, _, _ := fakeImage("unknown", "u")
	blob := func(i int) string { return f.images.layers[f.image.Manifest][i].Digest }
	for name, c := range map[string]struct {
		parent string
		labels map[string]string
		fell   float64
	}{
		"no labels":       {"", nil, 0},
		"no image":        {"", map[string]string{snapshots.LabelSnapshotRef: f.chains[0]}, 0},
		"no target":       {"", map[string]string{snapshotters.TargetRefLabel: f.image.Name, snapshotters.TargetManifestDigestLabel: f.image.Manifest}, 0},
		"unknown image":   {"", f.labelsOf(unknown, blob(0), f.chains[0]), 1},
		"another's chain": {"", f.labelsOf(f.image, blob(0), chains[0]), 1},
		"another's layer": {"", f.labelsOf(f.image, layers[0].Digest, f.chains[0]), 1},
		"wrong place":     {"", f.labelsOf(f.image, blob(1), f.chains[1]), 1},
		"wrong parent":    {chains[0], f.labelsOf(f.image, blob(1), f.chains[1]), 1},
	} {
		before := testutil.ToFloat64(f.fell)
		m, err := f.Prepare(t.Context(), name, c.parent, snapshots.WithLabels(c.labels))
		if err != nil || len(m) != 1 {
			t.Errorf("%s: %v, %v", name, m, err)
		}
		if fell := testutil.ToFloat64(f.fell) - before; fell != c.fell {
			t.Errorf("%s: %v layers were counted as not lazy, want %v", name, fell, c.fell)
		}
	}
	if _, err := f.Prepare(t.Context(), "no labels", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a key reused: %v", err)
	}
	if _, err := f.Prepare(t.Context(), "new", "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("a parent that is not there: %v", err)
	}
}

// TestShared has two images share their lowest layers, and the same one pulled twice.
func TestShared(t *testing.T) {
	f := newFixture(t, time.Hour)
	other, layers, chains := fakeImage("other", "a", "b", "d")
	f.images.layers[other.Manifest] = layers
	var wg sync.WaitGroup
	for _, of := range []struct {
		image  daemon.ImageRef
		chains []string
	}{{f.image, f.chains}, {f.image, f.chains}, {other, chains}} {
		wg.Go(func() { f.pull(of.image, of.chains, 3) })
	}
	wg.Wait()
	f.prepare("one", f.chains[2])
	f.prepare("two", chains[2])
	up := f.images.up()
	if len(up) != 2 || !slices.Contains(up, daemon.Chain{ImageRef: f.image, Layers: 3}) || !slices.Contains(up, daemon.Chain{ImageRef: other, Layers: 3}) {
		t.Errorf("mounted: %v", up)
	}
	f.remove("one", f.chains[2])
	if up := f.images.up(); !slices.Equal(up, []daemon.Chain{{ImageRef: other, Layers: 3}}) {
		t.Errorf("mounted when one has gone: %v", up)
	}
	if err := f.Remove(t.Context(), chains[1]); err == nil {
		t.Error("a layer that another lies on was removed")
	}
}

// TestIdle has an image unmounted some time after its last container, and mounted
// again for the next, also by one that was started anew.
func TestIdle(t *testing.T) {
	f := newFixture(t, 10*time.Millisecond)
	f.pull(f.image, f.chains, 3)
	f.prepare("one", f.chains[2])
	f.prepare("two", f.chains[2])
	f.remove("one")
	time.Sleep(50 * time.Millisecond) // for it to be wrong
	if len(f.images.up()) != 1 {
		t.Fatal("it was unmounted under a container")
	}
	f.remove("two")
	f.idle1(0)
	f.prepare("three", f.chains[2])
	f.idle1(1)
	if left := f.images.lastSwept(); len(left) != 3 {
		t.Errorf("what is not needed was swept with %v left", left)
	}
	root := f.root
	f.Close()
	f.images.mounted = map[daemon.Chain]bool{{ImageRef: f.image, Layers: 2}: true} // whose container went with the last one
	f.open(root, 10*time.Millisecond)
	f.idle1(0)
	if _, err := f.Mounts(t.Context(), "three"); err != nil {
		t.Fatal(err)
	}
	f.idle1(1)
}

// idle1 waits until so many chains are mounted.
func (f *fixture) idle1(n int) {
	f.t.Helper()
	for deadline := time.Now().Add(time.Minute); len(f.images.up()) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("mounted: %v, want %d", f.images.up(), n)
		}
	}
}

// TestMountFails has a container refused whose image cannot be mounted, with the
// reason, and leaves nothing of it.
func TestMountFails(t *testing.T) {
	f := newFixture(t, time.Hour)
	f.pull(f.image, f.chains, 3)
	f.images.err = errors.New("the registry is away")
	_, err := f.Prepare(t.Context(), "one", f.chains[2])
	if err == nil || !strings.Contains(err.Error(), f.image.Name) || !strings.Contains(err.Error(), "the registry is away") {
		t.Errorf("the error is %v", err)
	}
	if _, err := f.Stat(t.Context(), "one"); !errdefs.IsNotFound(err) {
		t.Errorf("it stays: %v", err)
	}
	f.images.err = nil
	f.prepare("one", f.chains[2])
}

// TestLabelsChanged has a client change the labels of a remote snapshot: it stays one.
func TestLabelsChanged(t *testing.T) {
	f := newFixture(t, time.Hour)
	f.pull(f.image, f.chains, 3)
	if _, err := f.Update(t.Context(), snapshots.Info{Name: f.chains[2], Labels: map[string]string{}}); err != nil {
		t.Fatal(err)
	}
	f.prepare("one", f.chains[2])
	if up := f.images.up(); !slices.Equal(up, []daemon.Chain{{ImageRef: f.image, Layers: 3}}) {
		t.Errorf("mounted: %v", up)
	}
}

// TestDamaged damages what says which layers a snapshot stands for: nothing lies on
// it then, it can be removed and pulled again, and other images have their way.
func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(file string) error{
		"gone":      os.Remove,
		"cut":       func(file string) error { return os.Truncate(file, 20) },
		"empty":     func(file string) error { return os.Truncate(file, 0) },
		"of no one": func(file string) error { return os.WriteFile(file, []byte("{}"), 0o600) },
		"endless":   func(file string) error { return errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)) },
		"directory": func(file string) error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, time.Hour)
			other, layers, chains := fakeImage("other", "x", "y")
			f.images.layers[other.Manifest] = layers
			f.pull(f.image, f.chains, 3)
			f.pull(other, chains, 2)
			f.prepare("there", chains[1])
			dir, err := f.dir(t.Context(), f.chains[2])
			if err == nil {
				err = damage(filepath.Join(dir, chainFile))
			}
			if err != nil {
				t.Fatal(err)
			}
			if m, err := f.Prepare(t.Context(), "one", f.chains[2]); err == nil || !strings.Contains(err.Error(), "pull it again") {
				t.Errorf("mounts %v, %v", m, err)
			}
			f.remove("there", chains[1], chains[0])
			if up := f.images.up(); len(up) != 0 || len(f.images.gone) != 2 {
				t.Errorf("another image was removed: mounted %v, forgotten %v", up, f.images.gone)
			}
			f.remove(f.chains[2], f.chains[1], f.chains[0])
			f.pull(f.image, f.chains, 3)
			f.prepare("two", f.chains[2])
		})
	}
}

// TestKilledOver leaves what a daemon that is killed leaves of a snapshot whose number
// is given again.
func TestKilledOver(t *testing.T) {
	f := newFixture(t, time.Hour)
	dir := filepath.Join(f.root, "snapshots", "1")
	if err := os.MkdirAll(filepath.Join(dir, "fs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, chainFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.pull(f.image, f.chains, 3)
	if at, err := f.dir(t.Context(), f.chains[0]); err != nil || at != dir {
		t.Fatalf("the first snapshot lies at %s, %v", at, err)
	}
	f.prepare("one", f.chains[2])
}

// TestThere pulls an image that is there, as from another namespace: nobody is asked
// for it. Where it would lie on something else it is not that image.
func TestThere(t *testing.T) {
	f := newFixture(t, time.Hour)
	f.pull(f.image, f.chains, 3)
	digests := f.images.layers[f.image.Manifest]
	f.images.layers = nil
	parents := append([]string{""}, f.chains...)
	for i, c := range f.chains {
		_, err := f.Prepare(t.Context(), "again", parents[i], snapshots.WithLabels(f.labelsOf(f.image, digests[i].Digest, c)))
		if !errdefs.IsAlreadyExists(err) {
			t.Fatalf("layer %d: %v, want that it exists already", i, err)
		}
	}
	if _, err := f.Prepare(t.Context(), "elsewhere", f.chains[0], snapshots.WithLabels(f.labelsOf(f.image, digests[2].Digest, f.chains[2]))); err != nil {
		t.Errorf("on another layer: %v, want a snapshot to unpack into", err)
	}
}
