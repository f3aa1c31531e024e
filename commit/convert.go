package commit

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/varvefs/varve/image"
)

// convertLayers is how many layers are converted side by side: one is read from
// the network while another is compressed.
const convertLayers = 2

// ConvertOptions say what layers are converted to. The zero value works.
type ConvertOptions struct {
	To      Compression // "" is EStargz
	OCI     bool        // docker's media types become OCI's, also where they need not
	Force   bool        // layers that have the form already are written anew
	Profile *Profile    // the files that come first in their layers; nil: none
	Dir     string      // for the tars of layers that are put into another order; "" is the system's
	Workers int         // that compress a layer, 0 for GOMAXPROCS
	// Report is told "Converting", "Converted" and "Kept" of each layer; it may
	// be nil. Calls come one at a time, as those of Warn do.
	Report Report
	Warn   func(format string, args ...any) // may be nil
}

// Converter makes images whose layers have another form, and keeps the blobs of
// the layers in a store. A layer that several images have is converted once.
//
// The layers that are made are held: Release lets them be kept by the manifests
// that name them, Discard takes them away again. Who makes a Converter ends it
// with one of them.
type Converter struct {
	store *image.Store
	o     ConvertOptions

	mu    sync.Mutex // guards what follows, and Report and Warn
	blobs []*image.BlobWriter
	made  map[string]*LayerDesc // by digest and what comes first; nil of a layer that stays as it is
	done  Conversions
}

// Conversions is what became of layers.
type Conversions struct {
	Converted, Kept int
	From, To        int64 // bytes of the blobs that were converted, and of what they became
}

// NewConverter makes a Converter that writes to a store.
func NewConverter(store *image.Store, o ConvertOptions) (*Converter, error) {
	var err error
	if o.To, err = ParseCompression(string(o.To)); err != nil {
		return nil, err
	}
	return &Converter{store: store, o: o, made: map[string]*LayerDesc{}}, nil
}

// Release lets go of the blobs, which the store's manifests keep from now on.
func (c *Converter) Release() { c.end((*image.BlobWriter).Release) }

// Discard deletes the blobs that no manifest of the store names. After Release
// it does nothing.
func (c *Converter) Discard() { c.end((*image.BlobWriter).Discard) }

func (c *Converter) end(each func(*image.BlobWriter)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.blobs {
		each(b)
	}
	c.blobs = nil
}

// Done says what became of the layers so far, each counted once.
func (c *Converter) Done() Conversions {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done
}

// Image converts the image base, whose config's bytes are config and whose layers
// blobs has. It gives the manifest and config that name the new layers. They are
// the old ones in all that the layers do not change; where no layer does, they
// are the same bytes.
//
// Every entry of a layer is kept, in its order but for the files of the profile:
// what a layer does to those below it stays the same. Only what belongs to the old
// form (its landmarks, its table of contents) is left out. Nothing of the machine,
// of its time or of its number of CPUs gets in: the same image gives the same bytes.
//
// Layers are read once, as a stream, and held against digest and diffID; a layer
// for which there is a profile is decompressed into a file without a name. A layer
// that the form cannot hold, whose names are not UTF-8 for one, stays as it is, and
// so do foreign layers.
//
// The manifest has neither Name nor Platform of its own, as that of [Image].
func (c *Converter) Image(ctx context.Context, base *image.Manifest, config []byte, blobs Blobs) (*image.Manifest, []byte, error) {
	m, made, err := c.image(ctx, base, config, blobs)
	if err != nil {
		return nil, nil, fmt.Errorf("convert %s: %w", base.Name.Familiar(), err)
	}
	return m, made, nil
}

func (c *Converter) image(ctx context.Context, base *image.Manifest, config []byte, blobs Blobs) (*image.Manifest, []byte, error) {
	if digest.FromBytes(config) != base.ConfigDesc.Digest {
		return nil, nil, fmt.Errorf("the config given is not %s", base.ConfigDesc.Digest)
	}
	was, err := image.ParseConfig(config)
	if err != nil {
		return nil, nil, err
	}
	ids, err := was.DiffIDs(len(base.Layers))
	if err != nil {
		return nil, nil, err
	}
	var s *search
	if c.o.Profile != nil {
		s = c.o.Profile.search(base)
	}
	todo, err := c.plan(base, ids, s)
	if err != nil {
		return nil, nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(convertLayers)
	for _, v := range todo {
		g.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			if err := c.layer(gctx, v, s, blobs); err != nil {
				return fmt.Errorf("layer %s: %w", v.layer.Digest, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, errors.Join(ctx.Err(), err)
	}
	if s != nil && s.missing() > 0 {
		c.warn("%d of the %d paths of the profile are not in %s", s.missing(), len(s.paths), base.Name.Familiar())
	}
	layers := make([]*LayerDesc, len(base.Layers))
	for _, v := range todo {
		for _, i := range v.at {
			layers[i] = v.desc
		}
	}
	return convertedImage(base, config, ids, layers, c.o.OCI)
}

// conversion is a layer of one image on its way.
type conversion struct {
	layer  image.Layer
	diffID digest.Digest
	at     []int // its places in the image, counted from the lowest layer
	desc   *LayerDesc

	// With a profile, a file is sought in the layers from the top down: above is
	// closed when all above this one were asked, asked when this one was.
	above, asked chan struct{}
}

// plan says which layers are to be read, each once, the topmost first.
func (c *Converter) plan(base *image.Manifest, ids []digest.Digest, s *search) ([]*conversion, error) {
	seen := map[digest.Digest]*conversion{}
	var todo []*conversion
	above := make(chan struct{})
	close(above)
	for i := len(base.Layers) - 1; i >= 0; i-- {
		l := base.Layers[i]
		if v := seen[l.Digest]; v != nil {
			if v.diffID != ids[i] {
				return nil, fmt.Errorf("%w: layer %s is %s and %s by the config", image.ErrMalformed, l.Digest, v.diffID, ids[i])
			}
			v.at = append(v.at, i)
			continue
		}
		v := &conversion{layer: l, diffID: ids[i], at: []int{i}, above: above, asked: make(chan struct{})}
		seen[l.Digest] = v
		if l.Foreign() || s == nil && c.keeps(l) {
			c.kept(v)
			continue
		}
		above = v.asked
		todo = append(todo, v)
	}
	return todo, nil
}

// keeps reports whether a layer has the form already, by what its descriptor says.
func (c *Converter) keeps(l image.Layer) bool {
	if c.o.Force {
		return false
	}
	gzip := strings.HasSuffix(l.MediaType, "+gzip") || strings.HasSuffix(l.MediaType, ".gzip")
	switch c.o.To {
	case EStargz:
		return gzip && l.Annotations[estargz.TOCJSONDigestAnnotation] != ""
	case ZstdChunked:
		return l.Zstd() && (l.Annotations[chunkedChecksum] != "" || l.Annotations[stargzChunkedChecksum] != "")
	case Zstd:
		return l.Zstd()
	}
	return gzip
}

// layer converts one layer, or finds that it stays as it is.
func (c *Converter) layer(ctx context.Context, v *conversion, s *search, blobs Blobs) error {
	if s != nil {
		return c.arranged(ctx, v, s, blobs)
	}
	if c.known(v, "") {
		return nil
	}
	in, err := openLayer(ctx, blobs, v.layer, v.diffID, c.progress(v.layer))
	if err != nil {
		return err
	}
	defer in.close()
	return c.write(v, nil, func(p *Packer) error {
		if err := repack(ctx, p, newLayerReader(in), nil); err != nil {
			return err
		}
		return in.end()
	})
}

// arranged converts a layer in which the files of a profile come first.
func (c *Converter) arranged(ctx context.Context, v *conversion, s *search, blobs Blobs) error {
	in, err := openLayer(ctx, blobs, v.layer, v.diffID, c.progress(v.layer))
	if err != nil {
		return err
	}
	f, err := in.spool(c.o.Dir)
	if in.close(); err != nil {
		return err
	}
	defer f.Close()
	sights, err := sightsOf(ctx, f, s.names)
	if err != nil {
		return err
	}
	select {
	case <-v.above:
	case <-ctx.Done():
		return ctx.Err()
	}
	taken := s.take(v.at, sights)
	close(v.asked)
	front, err := arrange(ctx, f, s.names, sights, taken)
	if err != nil {
		return err
	}
	if len(front) == 0 && c.keeps(v.layer) {
		c.kept(v)
		return nil
	}
	if c.known(v, frontKey(front)) {
		return nil
	}
	return c.write(v, front, func(p *Packer) error {
		skip, err := addFront(ctx, p, f, front)
		if err != nil {
			return err
		}
		return repack(ctx, p, newLayerReader(f.reader()), skip)
	})
}

// write packs a layer into a blob of the store. Where the form cannot hold it, it
// stays as it is.
func (c *Converter) write(v *conversion, front []*sight, fill func(*Packer) error) error {
	blob, err := c.store.NewBlob()
	if err != nil {
		return err
	}
	p := newConvertPacker(blob, PackOptions{Compression: c.o.To, Workers: c.o.Workers}, len(front) > 0)
	err = fill(p)
	packed, cerr := p.Close()
	if err == nil {
		err = cerr
	}
	if err == nil {
		err = blob.Commit(packed.Digest, packed.Size)
	}
	var no unfit
	switch err = asUnfit(err); {
	case errors.As(err, &no):
		blob.Discard()
		c.warn("layer %s stays as it is: %v", shortID(v.layer.Digest), no)
		c.remember(v, frontKey(front), nil)
		return nil
	case err != nil:
		blob.Discard()
		return err
	}
	mt, err := c.o.To.MediaType(false)
	if err != nil {
		blob.Discard()
		return err
	}
	v.desc = &LayerDesc{Digest: packed.Digest, DiffID: packed.DiffID, Size: packed.Size, MediaType: mt, Annotations: packed.Annotations}
	c.remember(v, frontKey(front), blob)
	return nil
}

// frontKey tells apart what becomes of a layer by what comes first in it.
func frontKey(front []*sight) string {
	names := make([]string, len(front))
	for i, s := range front {
		names[i] = s.head.Name
	}
	return strings.Join(names, "\x00")
}

// known reports whether a layer was converted for another image, and gives it what
// came of that.
func (c *Converter) known(v *conversion, front string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	desc, ok := c.made[v.layer.Digest.String()+front]
	switch v.desc = desc; {
	case ok && desc != nil:
		c.report(v.layer, "Converted", 0, 0)
	case ok:
		c.report(v.layer, "Kept", 0, 0)
	}
	return ok
}

// remember notes what became of a layer. blob is nil if it stays as it is.
func (c *Converter) remember(v *conversion, front string, blob *image.BlobWriter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.made[v.layer.Digest.String()+front] = v.desc
	if blob == nil {
		c.done.Kept++
		c.report(v.layer, "Kept", 0, 0)
		return
	}
	c.blobs = append(c.blobs, blob)
	c.done.Converted++
	c.done.From += v.layer.Size
	c.done.To += v.desc.Size
	c.report(v.layer, "Converted", 0, 0)
}

// kept notes a layer that stays as it is.
func (c *Converter) kept(v *conversion) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, again := c.made[v.layer.Digest.String()]; !again {
		c.made[v.layer.Digest.String()] = nil
		c.done.Kept++
	}
	c.report(v.layer, "Kept", 0, 0)
}

// progress tells how much of a layer's blob was read.
func (c *Converter) progress(l image.Layer) func(int64) {
	shown := int64(-showEvery)
	return func(n int64) {
		if n-shown < showEvery {
			return
		}
		shown = n
		c.mu.Lock()
		defer c.mu.Unlock()
		c.report(l, "Converting", n, l.Size)
	}
}

// report tells of a layer. The caller holds mu.
func (c *Converter) report(l image.Layer, status string, n, total int64) {
	if c.o.Report != nil {
		c.o.Report(shortID(l.Digest), status, n, total)
	}
}

func (c *Converter) warn(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.o.Warn != nil {
		c.o.Warn(format, args...)
	}
}
