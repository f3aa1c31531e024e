package daemon

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/varvefs/varve/commit"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

// frozen calls fn while nothing runs in the container whose mount is committed, if
// it is one that runs. It runs on whatever comes of fn, also if this process dies.
func (c *commission) frozen(ctx context.Context, fn func() error) (err error) {
	if c.NoPause || c.Container == nil {
		return fn()
	}
	_, _, client, err := c.running(ctx, c.ID)
	if st, serr := monitor.State(c.containerDir(c.ID)); err == nil && (serr != nil || st.State == monitor.Created) {
		err = errNotRunning
	}
	if errors.Is(err, errNotRunning) {
		return fn()
	}
	var thaw func() error
	if err == nil {
		thaw, err = client.Freeze(ctx)
	}
	switch {
	case errors.Is(err, monitor.ErrGone):
		return fn()
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		c.note.warn("%s cannot be paused (%v): what is written meanwhile is read again", c.Name, err)
		return fn()
	}
	defer func() {
		if terr := thaw(); terr != nil && !errors.Is(terr, monitor.ErrGone) {
			err = errors.Join(err, fmt.Errorf("let %s go on: %w", c.Name, terr))
		}
	}()
	return fn()
}

// ofContainer takes what a container was started with into the image, as docker
// does. What was asked for with --change comes after it.
func (c *commission) ofContainer() error {
	if c.Container == nil {
		return nil
	}
	o := c.Container.Options
	words := o.Cmd
	if image, err := c.imageConfig(c.base); err == nil && len(words) == 0 && o.Entrypoint == nil {
		words = image.Cmd
	}
	c.by = strings.Join(words, " ")
	lines, left := changesOf(o)
	for _, name := range left {
		c.note.warn("%s has line breaks: it does not become part of the image", name)
	}
	var err error
	if c.changes, err = commit.ParseChanges(append(lines, c.Changes...)); err != nil {
		return fmt.Errorf("%w%w", err, silent{errUsage})
	}
	return nil
}

// changesOf gives a container's options as instructions of a Dockerfile, and the
// names of those that cannot be said in one.
func changesOf(o run.Options) (lines, left []string) {
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`)
	add := func(verb, name, value string) {
		switch {
		case strings.ContainsAny(name+value, "\r\n"):
			left = append(left, verb+" "+name)
		case name != "":
			lines = append(lines, fmt.Sprintf(`%s "%s"="%s"`, verb, quote.Replace(name), quote.Replace(value)))
		default:
			lines = append(lines, verb+" "+quote.Replace(value))
		}
	}
	list := func(verb string, words []string) {
		b, err := json.Marshal(words)
		if err != nil {
			panic(err) // strings always can be
		}
		lines = append(lines, verb+" "+string(b))
	}
	for _, kv := range o.Env {
		if k, v, ok := strings.Cut(kv, "="); ok {
			add("ENV", k, v)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(o.Labels)) {
		add("LABEL", k, o.Labels[k])
	}
	if o.Workdir != "" {
		add("WORKDIR", "", o.Workdir)
	}
	if o.User != "" {
		add("USER", "", o.User)
	}
	if o.StopSignal != "" {
		add("STOPSIGNAL", "", o.StopSignal)
	}
	if o.Entrypoint != nil {
		list("ENTRYPOINT", append([]string{}, *o.Entrypoint...))
	}
	if len(o.Cmd) > 0 {
		list("CMD", o.Cmd)
	}
	return lines, left
}

// mountPoints gives the names that a container's bundle has made in the root.
func (u *using) mountPoints() map[string]bool {
	if u.Container == nil {
		return nil
	}
	names, err := run.MountPoints(u.d.containerDir(u.ID))
	if err != nil {
		u.d.log.Warn("the mount points of a container are not known", "mount", u.Name, "err", err)
	}
	set := map[string]bool{}
	for _, n := range names {
		set[strings.Trim(n, "/")] = true
	}
	return set
}

// mountPoint tells entries that are there for a container to be started, and empty,
// from what is to be committed.
func (u *using) mountPoint(es []commit.Entry) func(commit.Entry) bool {
	made := u.mountPoints()
	full := map[string]bool{}
	name := func(e commit.Entry) string { return strings.Trim(e.Header.Name, "/") }
	for _, e := range es {
		if len(made) > 0 && !(made[name(e)] && (e.Header.Typeflag == tar.TypeDir || e.Header.Size == 0)) {
			fill(full, name(e))
		}
	}
	return func(e commit.Entry) bool {
		return made[name(e)] && !full[name(e)] && (e.Header.Typeflag == tar.TypeDir || e.Header.Size == 0)
	}
}

// mountPointDelta is mountPoint for the lines of a diff.
func (u *using) mountPointDelta(ds []commit.Delta) func(commit.Delta) bool {
	made := u.mountPoints()
	full := map[string]bool{}
	empty := func(d commit.Delta) bool {
		return made[strings.Trim(d.Path, "/")] && d.Kind == commit.Added && d.Size == 0
	}
	for _, d := range ds {
		if len(made) > 0 && !empty(d) {
			fill(full, strings.Trim(d.Path, "/"))
		}
	}
	return func(d commit.Delta) bool { return empty(d) && !full[strings.Trim(d.Path, "/")] }
}

// fill notes that the directories in which a name lies are not empty.
func fill(full map[string]bool, name string) {
	for i, c := range name {
		if c == '/' {
			full[name[:i]] = true
		}
	}
}
