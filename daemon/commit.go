package daemon

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/image"
)

// Commit makes an image of what changed in a mount, and keeps it in the image
// store; pushes it if asked.
func (d *Daemon) Commit(ctx context.Context, o CommitOptions, n note) (_ *Committed, err error) {
	start := time.Now()
	defer func() {
		result := "ok"
		if err != nil {
			result = "error"
		}
		d.m.CommitSeconds.WithLabelValues(result).Observe(time.Since(start).Seconds())
	}()
	c := &commission{Daemon: d, CommitOptions: o, note: n}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	if c.using, err = d.use(ctx, o.Mount, n); err != nil {
		return nil, err
	}
	defer c.release()
	if err := c.findBase(); err != nil {
		return nil, err
	}
	if err := c.ofContainer(); err != nil {
		return nil, err
	}
	if err := c.tryChanges(); err != nil {
		return nil, fmt.Errorf("%w%w", err, silent{errUsage})
	}
	defer func() { c.layer.discard() }()
	err = c.frozen(ctx, func() error {
		return c.hold(ctx, !o.NoPause, func() error { return c.pack(ctx) })
	})
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", c.Name, err)
	}
	out := c.layer.committed()
	if o.DryRun {
		out.Deltas, err = c.deltas(ctx)
		return out, err
	}
	m, config, err := c.image()
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", c.Name, err)
	}
	out.Digest = m.Target.String()
	d.m.CommitBytes.Add(float64(out.Size))
	d.log.Info("committed", "mount", c.Name, "image", out.Digest, "ref", o.Ref, "bytes", out.Size, "dur", time.Since(start))
	if o.Push {
		b := d.blobsOf(m, c.ImageOptions, n)
		defer b.Close()
		to := ImageOptions{Insecure: o.Insecure, Auth: o.Auth, AuthConfig: o.AuthConfig}
		if out.Pushed, err = d.push(ctx, c.name, m, config, b, to, n); err != nil {
			return nil, fmt.Errorf("%s is committed as %s, but not pushed: %w", c.Name, out.Digest, err)
		}
	}
	return out, nil
}

// commission is a commit on its way.
type commission struct {
	*Daemon
	*using
	CommitOptions
	note note

	name        image.Name // zero for an image without one
	changes     commit.Changes
	compression commit.Compression

	base   *image.Manifest
	config []byte
	chain  int // layers on top of the base that were committed here and are squashed
	by     string
	layer  *layer
}

// check reads what was asked for, before anything is done.
func (c *commission) check() (err error) {
	if c.Ref != "" {
		if c.name, err = image.ParseName(c.Ref); err != nil {
			return err
		}
		if c.name.IsLocal() || c.name.IsID() || c.name.Digest() != "" {
			return fmt.Errorf("%s: an image is committed under a name and a tag", c.Ref)
		}
	}
	if c.changes, err = commit.ParseChanges(c.Changes); err != nil {
		return err
	}
	if c.compression, err = commit.ParseCompression(c.Compression); err != nil {
		return err
	}
	switch c.Format {
	case "", "oci", "docker":
	default:
		return fmt.Errorf("--format %q: want oci or docker", c.Format)
	}
	_, err = c.compression.MediaType(c.Format == "docker")
	return err
}

// findBase gives the image that was mounted, as it is in the image store.
func (c *commission) findBase() error {
	_, hex, _ := strings.Cut(c.tree.manifest.Target.String(), ":")
	id, err := image.ParseName(hex)
	if err != nil {
		return err
	}
	if c.base, c.config, err = c.images.Get(id, c.tree.manifest.Platform); err != nil {
		return fmt.Errorf("the image that was mounted: %w", err)
	}
	if name, err := image.ParseName(c.mount.Image); err == nil && !name.IsID() {
		c.base.Name = name
	}
	if c.Squash {
		for i := len(c.base.Layers) - 1; i >= 0 && c.images.HasBlob(c.base.Layers[i].Digest); i-- {
			c.chain++
		}
	}
	return nil
}

// below finds the image under the layers that are squashed, by what each says of
// its base; nothing where one does not say.
func (c *commission) below() (image.Name, digest.Digest) {
	var name image.Name
	want := len(c.base.Layers) - c.chain
	for m := c.base; ; {
		var doc struct{ Annotations map[string]string }
		if json.Unmarshal(m.Raw, &doc) != nil {
			return image.Name{}, ""
		}
		base := digest.Digest(doc.Annotations[ocispec.AnnotationBaseImageDigest])
		if base.Validate() != nil {
			return image.Name{}, ""
		}
		id, err := image.ParseName(base.Encoded())
		if err != nil {
			return image.Name{}, ""
		}
		name, _ = image.ParseName(doc.Annotations[ocispec.AnnotationBaseImageName])
		next, _, err := c.images.Get(id, c.base.Platform)
		if err != nil || len(next.Layers) < want || len(next.Layers) > len(m.Layers) {
			return image.Name{}, ""
		}
		if m = next; len(m.Layers) == want {
			return name, m.Digest
		}
	}
}

// tryChanges finds what no config takes before a layer is written for it.
func (c *commission) tryChanges() error {
	if c.changes.IsZero() {
		return nil
	}
	_, _, err := commit.Image(c.base, c.config, nil, commit.Meta{Changes: c.changes})
	return err
}

// layer is the new layer: packed, and in the image store under a lease.
type layer struct {
	*commit.Packed // nil if nothing changed
	entries        int
	blob           *image.BlobWriter // nil of a dry run
	gone           map[string]bool   // names that were removed before they were read
}

func (l *layer) discard() {
	if l != nil && l.blob != nil {
		l.blob.Discard()
	}
}

func (l *layer) committed() *Committed {
	out := &Committed{Entries: l.entries}
	if l.Packed != nil {
		out.Layer, out.Size, out.Raw = l.Digest.String(), l.Size, l.Uncompressed
	}
	return out
}

// pack writes the layer. It may be called again, where the upper changed
// meanwhile.
func (c *commission) pack(ctx context.Context) (err error) {
	c.layer.discard()
	c.layer = &layer{gone: map[string]bool{}}
	entries, close, err := c.entries(ctx)
	if err != nil {
		return err
	}
	defer close()
	if len(entries) == 0 {
		return nil
	}
	c.layer.entries = len(entries)
	var w io.Writer = io.Discard
	if !c.DryRun {
		if c.layer.blob, err = c.images.NewBlob(); err != nil {
			return err
		}
		w = c.layer.blob
	}
	p := commit.NewPacker(w, commit.PackOptions{Compression: c.compression})
	m := meter{note: c.note, id: c.Name}
	for i := range entries {
		m.total += entries[i].Header.Size
		if err = p.Check(entries[i].Header); err != nil {
			break
		}
	}
	for i := 0; i < len(entries) && err == nil; i++ {
		err = c.add(ctx, p, &entries[i], &m)
	}
	packed, cerr := p.Close()
	if cerr != nil {
		return cerr
	}
	if err != nil {
		return err
	}
	m.end()
	if c.layer.blob != nil {
		if err := c.layer.blob.Commit(packed.Digest, packed.Size); err != nil {
			return err
		}
	}
	c.layer.Packed = packed
	return nil
}

func (c *commission) add(ctx context.Context, p *commit.Packer, e *commit.Entry, m *meter) error {
	if e.Header.Typeflag == tar.TypeLink && c.layer.gone[e.Header.Linkname] {
		c.note.warn("%q was removed while it was being committed: it is left out", "/"+e.Path)
		return nil
	}
	r, err := e.Open()
	if c.NoPause && isGone(err) {
		c.layer.gone[e.Header.Name] = true
		c.note.warn("%q was removed while it was being committed: it is left out", "/"+e.Path)
		return nil
	}
	if err != nil {
		return err
	}
	if r == nil {
		return p.Add(ctx, e.Header, nil)
	}
	defer r.Close()
	counted := io.TeeReader(r, m)
	if c.NoPause {
		// As tar does of a file that shrinks or grows while it is read.
		counted = io.LimitReader(io.MultiReader(counted, zeroes{}), e.Header.Size)
	}
	return p.Add(ctx, e.Header, counted)
}

// isGone reports whether a file that was listed is no more, or something else by
// now.
func isGone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EINVAL)
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// entries gives what the layer is to hold, and tells of what it cannot, and of
// what it perhaps should not.
func (c *commission) entries(ctx context.Context) (es []commit.Entry, done func(), err error) {
	done = func() {}
	var got commit.Contents
	if c.upper != nil {
		o := commit.EntryOptions{Include: c.Include, Exclude: c.Exclude}
		if c.RewriteTimestamp {
			o.Clamp = c.Created
		}
		p, err := commit.Entries(ctx, c.upper, c.tree.index.Image, o)
		if err != nil {
			return nil, done, err
		}
		got = *p
		got.Entries = slices.DeleteFunc(got.Entries, c.mountPoint(got.Entries))
	}
	for _, w := range got.Warnings {
		c.note.warn("%s", w)
	}
	for _, path := range got.Secrets {
		c.note.warn("/%s looks like a secret and becomes part of the image (--exclude leaves it out)", strings.TrimPrefix(path, "/"))
	}
	if c.chain == 0 {
		return got.Entries, done, nil
	}
	var chain []commit.Blob
	var files []*os.File
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	ids, err := c.diffIDs()
	if err != nil {
		return nil, done, err
	}
	for i := len(c.base.Layers) - c.chain; i < len(c.base.Layers); i++ {
		f, size, err := c.images.OpenBlob(c.base.Layers[i].Digest)
		if err != nil {
			closeAll()
			return nil, done, err
		}
		files = append(files, f)
		chain = append(chain, commit.Blob{ReaderAt: f, Size: size, DiffID: ids[i]})
	}
	s, err := commit.Squash(ctx, chain, got.Entries, c.dirs.State)
	if err != nil {
		closeAll()
		return nil, done, err
	}
	return s.Entries, func() { s.Close(); closeAll() }, nil
}

func (c *commission) diffIDs() ([]digest.Digest, error) {
	config, err := image.ParseConfig(c.config)
	if err != nil {
		return nil, err
	}
	return config.DiffIDs(len(c.base.Layers))
}

// image makes the image and stores it: from then on it can be mounted.
func (c *commission) image() (*image.Manifest, []byte, error) {
	meta := commit.Meta{
		Author: c.Author, Comment: c.Message, CreatedBy: cmp.Or(c.by, "varve commit"), Created: createdOr(c.Created),
		Changes: c.changes, Format: c.Format, Squash: c.chain,
	}
	if !c.base.Name.IsZero() && !c.base.Name.IsLocal() && !c.base.Name.IsID() {
		meta.BaseName = c.base.Name
	}
	if c.chain > 0 {
		meta.BaseName, meta.BaseDigest = c.below()
	}
	var desc *commit.LayerDesc
	if l := c.layer; l.Packed != nil {
		mt, err := c.compression.MediaType(false)
		if err != nil {
			return nil, nil, err
		}
		desc = &commit.LayerDesc{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, MediaType: mt, Annotations: l.Annotations}
	}
	m, config, err := commit.Image(c.base, c.config, desc, meta)
	if err != nil {
		return nil, nil, err
	}
	m.Name = c.name
	if err := c.images.PutFrom(m, config, sourcesOf(c.base)); err != nil {
		return nil, nil, err
	}
	if c.layer.blob != nil {
		c.layer.blob.Release()
	}
	// The base's layers are read by the indexes that the base was found to have.
	if known := c.knownIndexes(c.base.Digest); len(known) > 0 {
		c.rememberIndexes(m.Digest, known)
	}
	return m, config, nil
}
