package commit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/varvefs/varve/image"
)

// stream sends the blob as it is read, the rest of it again after a break.
func (u *upload) stream(ctx context.Context) error {
	if err := u.resume(ctx); err != nil {
		return err
	}
	u.store() // the place may be one that a repository gave instead of the blob
	for {
		if u.place == nil {
			u.drop()
			if err := u.start(ctx); err != nil {
				return err
			}
			u.store()
		}
		if u.have < u.size {
			if err := u.patch(ctx); err != nil {
				u.leave(ctx, err)
				return err
			}
			continue
		}
		if err := u.prove(ctx); err != nil {
			u.leave(ctx, err)
			return err
		}
		if done, err := u.finish(ctx, u.end(0)); done || err != nil {
			return err
		}
		if u.place != nil {
			if err := u.status(ctx); err != nil {
				return err
			}
		}
	}
}

// prove checks the digest of all that was sent, before the upload becomes a blob.
func (u *upload) prove(ctx context.Context) error {
	if u.tally.n != u.size {
		// An earlier push had sent it all, or the end of it.
		rctx, w := newWatch(ctx, sourceTime)
		defer w.stop()
		w.stall = u.client.stall
		b, err := u.body(rctx, w, u.size, u.size)
		if err != nil {
			if cause := context.Cause(rctx); cause != nil && ctx.Err() == nil {
				err = cause
			}
			err, _ = networkError(ctx, "", err)
			return err
		}
		b.Close()
	}
	if got := u.tally.sum(); got != u.digest {
		return &mismatchError{u.damaged(got)}
	}
	return nil
}

// mismatchError says that an upload holds other bytes than its blob's.
type mismatchError struct{ error }

func (e *mismatchError) Unwrap() error { return e.error }

// leave takes away an upload that must not become a blob. Any other that failed
// stays for a later push.
func (u *upload) leave(ctx context.Context, err error) {
	var m *mismatchError
	if errors.As(err, &m) {
		u.abandon(ctx)
		u.drop()
		return
	}
	u.store()
}

// patch sends the next bytes, in one request all that the registry takes.
func (u *upload) patch(ctx context.Context) error {
	off, end := u.have, u.size
	if u.chunk > 0 {
		end = min(end, off+u.chunk)
	}
	r := request{
		method: http.MethodPatch, url: u.place, length: end - off,
		head: http.Header{"Content-Type": {"application/octet-stream"}},
		body: func(ctx context.Context, w *watch) (io.ReadCloser, error) { return u.body(ctx, w, off, end) },
	}
	// A stream from the start is what docker sends, so all registries take it;
	// a part is to say where it belongs (distribution-spec, "Pushing a blob in
	// chunks").
	if off > 0 || end < u.size {
		r.head.Set("Content-Range", fmt.Sprintf("%d-%d", off, end-1))
	}
	a, passing, err := u.client.once(ctx, r)
	if err != nil && !passing {
		return err
	}
	switch {
	case err != nil:
	case a.code == http.StatusAccepted, a.code == http.StatusCreated, a.code == http.StatusNoContent:
		// 201 is ECR's.
		return u.taken(ctx, a, off, end)
	case a.code == http.StatusRequestEntityTooLarge:
		if err := u.smaller(end-off, a); err != nil {
			return err
		}
		u.resumed = true
		return u.status(ctx)
	case a.code == http.StatusUnauthorized, a.code == http.StatusForbidden:
		return a.failed("upload")
	case a.code == http.StatusRequestedRangeNotSatisfiable:
		passing, err = true, a.failed("upload")
	case a.code == http.StatusNotFound, a.code == http.StatusGone, a.code == http.StatusBadRequest && u.resumed:
		return u.lose(ctx, a.failed("upload"))
	default:
		err = a.failed("upload")
	}
	if !passing {
		return err
	}
	if err := u.client.pause(ctx, u.budget, a, err); err != nil {
		return err
	}
	u.resumed = true
	return u.status(ctx)
}

// taken goes on after a part that the registry says it has.
func (u *upload) taken(ctx context.Context, a *answer, off, end int64) error {
	if err := u.move(a); err != nil {
		return err
	}
	n, told := a.received()
	if told && n > u.sent {
		return u.lie(a, n)
	}
	if told && n < end {
		// Some tell of other things in Range than of all they have. One that is
		// asked and cannot tell, or tells of nothing, has it all or refuses the end.
		place := u.place
		if err := u.status(ctx); err != nil {
			return err
		}
		switch {
		case u.place == nil || u.have <= off && end == u.size:
			u.place, u.sent, u.have, u.resumed = place, end, end, true
			return nil
		case u.have <= off:
			u.resumed = true
			return u.client.pause(ctx, u.budget, nil, pushErrorf(image.ErrMalformed, nil,
				"upload: %s takes bytes and does not keep them, it has %d of %d", a.url.Host, u.have, u.size))
		}
		u.budget.progress()
		return nil
	}
	u.have = end
	u.budget.progress()
	u.store()
	return nil
}

// smaller makes the next requests smaller than one of n bytes that was refused.
func (u *upload) smaller(n int64, a *answer) error {
	if n <= leastChunk {
		return a.failed("upload")
	}
	u.chunk = max(min(n/4, firstChunk), leastChunk)
	return nil
}

// status asks how far the upload is. One that is gone, or of which the registry
// cannot tell, leaves no place: it is to be opened anew.
func (u *upload) status(ctx context.Context) error {
	var a *answer
	for failed := 0; ; failed++ {
		var passing bool
		var err error
		a, passing, err = u.client.once(ctx, request{method: http.MethodGet, url: u.place})
		if err != nil && !passing {
			return err
		}
		// Some answer 500 for an upload that they do not know.
		if !passing || err == nil && a.code == http.StatusInternalServerError && failed > 0 {
			break
		}
		if err == nil {
			err = a.failed("ask for the upload")
		}
		if err := u.client.pause(ctx, u.budget, a, err); err != nil {
			return err
		}
	}
	n, told := a.received()
	if a.code < 200 || a.code > 299 || !told {
		u.forget()
		return nil
	}
	if n > u.sent || n > u.size {
		return u.lie(a, n)
	}
	if n > u.have {
		u.budget.progress()
	}
	u.have = n
	if a.head.Get("Location") != "" {
		if err := u.move(a); err != nil {
			return err
		}
	}
	u.store()
	return nil
}

// lie names a registry that has more than it was given.
func (u *upload) lie(a *answer, n int64) error {
	return pushErrorf(image.ErrMalformed, nil, "upload: %s says that it has %d bytes, of which %d were sent", a.url.Host, n, u.sent)
}

// move follows an upload to where the last answer says that it goes on.
func (u *upload) move(a *answer) error {
	if a.head.Get("Location") == "" {
		return nil
	}
	place, err := a.location()
	if err == nil {
		u.place = place
	}
	return err
}

// lose gives an upload up that the registry no longer knows, and lets another
// be opened if the attempts are not spent. err is why.
func (u *upload) lose(ctx context.Context, err error) error {
	u.forget()
	if u.lost++; u.lost > maxLost {
		return err
	}
	return u.client.pause(ctx, u.budget, nil, err)
}

func (u *upload) forget() { u.place, u.have, u.sent = nil, 0, 0 }

// abandon takes the upload away, if the registry is so kind.
func (u *upload) abandon(ctx context.Context) {
	if u.place != nil {
		u.client.remove(ctx, u.place)
		u.forget()
	}
}

// resume takes up what an earlier push has left.
func (u *upload) resume(ctx context.Context) error {
	if u.o.Sessions == nil {
		return nil
	}
	s, ok := u.o.Sessions.Load(u.key)
	if !ok {
		return nil
	}
	place, err := url.Parse(s.Location)
	if err != nil || checkPlace(&u.client.base, place) != nil {
		u.drop()
		return nil
	}
	fresh := u.place // from a mount
	u.place, u.sent, u.resumed = place, u.size, true
	u.tally.load(s.Marks, u.size)
	if err := u.status(ctx); err != nil {
		return err
	}
	if u.place == nil {
		u.place, u.resumed = fresh, false
		u.tally.load(nil, 0)
		return nil
	}
	u.count(func(d *Pushed) { d.Resumed += u.have })
	if fresh != nil {
		u.client.remove(ctx, fresh)
	}
	return nil
}

func (u *upload) store() {
	if u.o.Sessions != nil && u.place != nil {
		u.o.Sessions.Store(u.key, Session{Location: u.place.String(), Marks: u.tally.stored()})
	}
}

func (u *upload) drop() {
	if u.o.Sessions != nil {
		u.o.Sessions.Drop(u.key)
	}
}
