package commit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"

	"github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/image"
)

const (
	// smallBlob goes in the request that ends its upload, as containerd sends
	// all; it is verified before.
	smallBlob = 1 << 20
	// A proxy that refuses a body for its size (413) is tried with less, from
	// firstChunk bytes down to leastChunk.
	firstChunk = 64 << 20
	leastChunk = 1 << 20
	// maxLost is how often an upload that the registry forgets, or does not keep,
	// is begun again from its start.
	maxLost = 3
)

// upload is one blob on its way into the registry. Only its own goroutine uses
// it, but for what body guards.
type upload struct {
	*pusher
	client *client
	what   string // for errors: "layer", "config"
	digest digest.Digest
	size   int64
	from   []string // repositories to mount it from
	local  bool     // its bytes are here
	quiet  bool     // no line for it
	key    string   // of its Session
	chunk  int64    // most bytes of one request, 0 for all that are left
	open   func(ctx context.Context, off int64) (io.ReadCloser, error)

	place   *url.URL // where the upload goes on; nil: it is still to be opened
	have    int64    // bytes that the registry has
	sent    int64    // bytes that went there in this upload, or may have before
	resumed bool     // the upload is an earlier push's, or was broken
	lost    int      // uploads that the registry forgot
	tally   *tally
	budget  *budget
}

// run brings the blob into the registry by the cheapest way there is.
func (u *upload) run(ctx context.Context) error {
	status, err := u.bring(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return pushErrorf(kindOf(err), err, "%s %s: %s", u.what, u.digest, err)
	}
	if !u.quiet {
		u.report(u.digest, status, u.size, u.size)
	}
	return nil
}

func (u *upload) bring(ctx context.Context) (string, error) {
	there, err := u.exists(ctx)
	if err != nil {
		return "", err
	}
	if there {
		u.count(func(d *Pushed) { d.Existed.add(u.size) })
		u.drop()
		return "Layer already exists", nil
	}
	for _, repo := range u.from {
		if repo == u.client.repo {
			continue
		}
		mounted, err := u.mount(ctx, repo)
		if err != nil {
			return "", err
		}
		if mounted {
			u.count(func(d *Pushed) { d.Mounted.add(u.size) })
			u.abandon(ctx) // what a repository before it gave
			u.drop()
			return "Mounted from " + repo, nil
		}
	}
	if !u.quiet {
		u.report(u.digest, "Pushing", 0, u.size)
	}
	if u.size <= smallBlob {
		err = u.whole(ctx)
	} else {
		err = u.stream(ctx)
	}
	if err != nil {
		return "", err
	}
	u.drop()
	u.count(func(d *Pushed) {
		if u.local {
			d.Uploaded.add(u.size)
		} else {
			d.Streamed.add(u.size)
		}
	})
	return "Pushed", nil
}

// exists asks for the blob. Whoever may not, or does not know how to, answer
// that is asked to take an upload, whose answer counts.
func (u *upload) exists(ctx context.Context) (bool, error) {
	a, err := u.client.ask(ctx, u.budget, "look for it", request{
		method: http.MethodHead, url: u.client.url("blobs/"+u.digest.String(), nil),
	})
	if err != nil || a.code != http.StatusOK {
		return false, err
	}
	if err := a.sameDigest(u.digest, "look for it"); err != nil {
		return false, err
	}
	// Some answer a HEAD with 0, or with what a proxy makes of it.
	if a.size > 0 && a.size != u.size && a.head.Get("Content-Encoding") == "" {
		return false, pushErrorf(image.ErrMalformed, nil, "%s has it with %d bytes, the manifest says %d", a.url.Host, a.size, u.size)
	}
	return true, nil
}

// mount asks for the blob of another repository. A registry that will not gives
// a place for an upload instead, which is kept.
func (u *upload) mount(ctx context.Context, repo string) (bool, error) {
	doing := "mount it from " + repo
	r := request{
		method: http.MethodPost,
		url:    u.client.url("blobs/uploads/", url.Values{"mount": {u.digest.String()}, "from": {repo}}),
	}
	a, passing, err := u.client.once(ctx, r)
	for passing && (err != nil || a.code == http.StatusTooManyRequests) {
		if err == nil {
			err = a.failed(doing)
		}
		if err := u.client.pause(ctx, u.budget, a, err); err != nil {
			return false, err
		}
		a, passing, err = u.client.once(ctx, r)
	}
	switch {
	case err != nil:
		return false, err
	case a.code == http.StatusCreated:
		if d := digest.Digest(path.Base(a.head.Get("Location"))); d.Validate() == nil && d != u.digest {
			return false, pushErrorf(image.ErrMalformed, nil, "%s: %s gives %s in its place", doing, a.url.Host, d)
		}
		return true, a.sameDigest(u.digest, doing)
	case a.code == http.StatusAccepted:
		u.abandon(ctx)
		u.place, err = a.location()
		return false, err
	case a.code >= 400:
		// Not there, not to be read with these credentials, or not supported.
		return false, nil
	}
	return false, a.failed(doing)
}

// start opens an upload.
func (u *upload) start(ctx context.Context) error {
	if u.place != nil {
		return nil
	}
	a, err := u.client.ask(ctx, u.budget, "open an upload", request{
		method: http.MethodPost, url: u.client.url("blobs/uploads/", nil),
	})
	if err != nil {
		return err
	}
	if a.code != http.StatusAccepted {
		return a.failed("open an upload")
	}
	u.have, u.sent, u.resumed = 0, 0, false
	u.place, err = a.location()
	return err
}

// whole sends a small blob, read and verified before the first byte leaves.
func (u *upload) whole(ctx context.Context) error {
	data, err := u.readWhole(ctx)
	if err != nil {
		u.abandon(ctx)
		return err
	}
	for {
		if err := u.start(ctx); err != nil {
			return err
		}
		r := u.end(int64(len(data)))
		r.body = func(context.Context, *watch) (io.ReadCloser, error) {
			u.count(func(d *Pushed) { d.Sent += int64(len(data)) })
			return io.NopCloser(bytes.NewReader(data)), nil
		}
		if len(data) == 0 {
			r.body = nil
		}
		if done, err := u.finish(ctx, r); done || err != nil {
			return err
		}
		// Whether any of it is in the upload is not worth asking.
		u.place = nil
	}
}

func (u *upload) readWhole(ctx context.Context) ([]byte, error) {
	rctx, w := newWatch(ctx, sourceTime)
	defer w.stop()
	src, err := u.open(rctx, 0)
	if err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	defer src.Close()
	data, err := io.ReadAll(io.LimitReader(src, u.size))
	u.received(len(data))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read: %w", err)
	}
	if got := digest.FromBytes(data); got != u.digest {
		return nil, u.damaged(got)
	}
	return data, nil
}

func (u *upload) damaged(got digest.Digest) error {
	where := "where it comes from"
	if u.local {
		where = "here"
	}
	return pushErrorf(image.ErrMalformed, nil, "the bytes %s have the digest %s, the blob is damaged or was tampered with; nothing was pushed of it", where, got)
}

// end is the request that makes an upload a blob.
func (u *upload) end(length int64) request {
	place := *u.place
	// Appended, as the query may be signed in the order it has.
	if place.RawQuery != "" {
		place.RawQuery += "&"
	}
	place.RawQuery += "digest=" + url.QueryEscape(u.digest.String())
	return request{
		method: http.MethodPut, url: &place, length: length, patience: commitTime,
		head: http.Header{"Content-Type": {"application/octet-stream"}},
	}
}

// finish ends the upload. Not done and no error means: see how far the upload
// is, and go on.
func (u *upload) finish(ctx context.Context, r request) (done bool, _ error) {
	a, passing, err := u.client.once(ctx, r)
	switch {
	case err != nil && !passing:
		return false, err
	case err == nil && a.code == http.StatusCreated:
		return true, a.sameDigest(u.digest, "end the upload")
	case err == nil && (a.code == http.StatusUnauthorized || a.code == http.StatusForbidden):
		return false, a.failed("end the upload")
	}
	if err == nil {
		err = a.failed("end the upload")
	}
	if passing {
		if err := u.client.pause(ctx, u.budget, a, err); err != nil {
			return false, err
		}
	}
	// It may have been done, and only the answer lost.
	there, herr := u.exists(ctx)
	if there || herr != nil {
		return there, herr
	}
	if passing {
		return false, nil
	}
	// An upload that was broken may hold what the registry did not tell of. One
	// that was not and is refused, is refused.
	if a.code < 400 || !u.resumed && a.code != http.StatusNotFound {
		return false, err
	}
	return false, u.lose(ctx, err)
}
