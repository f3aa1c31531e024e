package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/varvefs/varve/fetch"
	"github.com/varvefs/varve/fs"
	"github.com/varvefs/varve/image"
	"github.com/varvefs/varve/index"
)

// Exit codes, as the command gives them and as errors carry them over the
// socket. Scripts rely on them.
const (
	ExitError       = 1
	ExitUsage       = 2
	ExitNotFound    = 3
	ExitAuth        = 4
	ExitUnreachable = 5
	ExitVerify      = 6
	ExitBusy        = 7
)

// Error is an error as it crosses the socket.
type Error struct {
	Message string `json:"message"`
	Exit    int    `json:"exit"`
}

func (e *Error) Error() string { return e.Message }

// errUsage marks what the caller asked for wrongly.
var errUsage = errors.New("usage")

// errNoMount is what a name that fits no mount gives.
var errNoMount = errors.New("no such mount")

// wire gives an error its exit code.
func wire(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	e = &Error{Message: err.Error(), Exit: ExitError}
	for _, c := range []struct {
		is   error
		exit int
	}{
		{errUsage, ExitUsage},
		{image.ErrUnauthorized, ExitAuth},
		{fetch.ErrVerify, ExitVerify}, {index.ErrMalformed, ExitVerify}, {image.ErrMalformed, ExitVerify},
		{image.ErrNotFound, ExitNotFound}, {image.ErrNoPlatform, ExitNotFound}, {errNoMount, ExitNotFound}, {index.ErrNotExist, ExitNotFound},
		{image.ErrUnreachable, ExitUnreachable}, {fetch.ErrUnavailable, ExitUnreachable}, {fetch.ErrOffline, ExitUnreachable},
		{fs.ErrBusy, ExitBusy},
		{context.Canceled, 130},
	} {
		if errors.Is(err, c.is) {
			e.Exit = c.exit
			break
		}
	}
	return e
}

// ImageOptions say which image and how it may be had.
type ImageOptions struct {
	Image    string     `json:"image"`
	Platform string     `json:"platform,omitempty"` // "" is this machine's
	Pull     string     `json:"pull,omitempty"`     // missing (default), always, never
	Offline  bool       `json:"offline,omitempty"`  // never ask the network, for bytes neither
	Insecure bool       `json:"insecure,omitempty"` // plain HTTP and unverified TLS allowed
	Index    string     `json:"index,omitempty"`    // what layers are read by: auto (default), none, require
	Layers   int        `json:"layers,omitempty"`   // how many of them, from the lowest up; 0 is all
	Auth     image.Auth `json:"auth"`               // where credentials are, never what they are
	// AuthConfig is the caller's DOCKER_AUTH_CONFIG. It crosses the socket and is
	// never stored: after a restart the mount has what Auth names.
	AuthConfig string `json:"auth_config,omitempty"`

	target string   // the image ID of a mount that comes back, whatever its tag names by now
	keys   []string // what its layers had in the store
	alone  bool     // nothing is fetched but what is read
}

// MountOptions are what `varve mount` asks for.
type MountOptions struct {
	ImageOptions
	Dir    string `json:"dir,omitempty"`  // absolute; "" for one below the runtime directory
	Name   string `json:"name,omitempty"` // "" for one made from the image's
	Face   string `json:"face,omitempty"` // auto (default), kernel, fuse
	Setuid bool   `json:"setuid,omitempty"`

	RW      bool   `json:"rw,omitempty"`      // changes go to an upper and stay there
	Upper   string `json:"upper,omitempty"`   // its directory, absolute; "" for one in the state directory
	Overlay string `json:"overlay,omitempty"` // who writes it: auto (default), kernel, fuse

	Base bool `json:"base,omitempty"` // containers lie on it, and nobody else comes there

	Wait bool `json:"wait,omitempty"` // until layers that must be read whole have been

	Prefetch string `json:"prefetch,omitempty"` // what is fetched ahead of need: none, profile (default), all
	Profile  string `json:"profile,omitempty"`  // the workload whose start-up profile is used and recorded
	// RecordFor is how long the start is recorded, 0: not at all. nil: until it goes
	// quiet.
	RecordFor *time.Duration `json:"record_for,omitempty"`

	proc *process // the container that it is for
}

// Mount is what is known of a mount.
type Mount struct {
	ID         string    `json:"Id"`
	Name       string    `json:"Name"`
	Image      string    `json:"Image"`
	Target     string    `json:"Digest"`   // of what the name points at
	Manifest   string    `json:"Manifest"` // digest of the platform's manifest
	Config     string    `json:"Config"`   // digest of the config
	Platform   string    `json:"Platform"`
	Dir        string    `json:"Mountpoint"`
	State      string    `json:"State"` // mounted, reading, restoring, failed, unmounted
	Error      string    `json:"Error,omitempty"`
	Created    time.Time `json:"Created"`
	Face       string    `json:"Face"`
	FaceReason string    `json:"FaceReason"`
	Offline    bool      `json:"Offline"`

	Base          bool       `json:"Base,omitempty"` // containers of containerd lie on it
	RW            bool       `json:"RW"`
	Upper         string     `json:"Upper,omitempty"`
	Overlay       string     `json:"Overlay,omitempty"` // who writes the upper: kernel, fuse
	OverlayReason string     `json:"OverlayReason,omitempty"`
	UpperBytes    int64      `json:"UpperBytes,omitempty"` // on disk; in an inspection only
	Unmounted     *time.Time `json:"Unmounted,omitempty"`  // since when only its changes are kept

	Container *Container `json:"Container,omitempty"` // the process that runs in it, or did

	Prefetch  string      `json:"Prefetch,omitempty"` // none, profile, all
	Profile   *ProfileUse `json:"Profile,omitempty"`
	Recording bool        `json:"Recording"` // what it reads first is noted for the next start

	Files   uint64  `json:"Files"`   // inodes of the image
	Size    int64   `json:"Size"`    // bytes of all layers, compressed
	Fetched int64   `json:"Fetched"` // bytes that the network brought for them
	Local   int64   `json:"Local"`   // bytes of them, compressed, that are here
	Layers  []Layer `json:"Layers,omitempty"`
}

// Layer is what is known of a layer of a mount.
type Layer struct {
	Digest    string `json:"Digest"`
	DiffID    string `json:"DiffID,omitempty"`
	MediaType string `json:"MediaType"`
	Format    string `json:"Format"`
	Index     string `json:"Index"`              // what makes it lazy: toc, varve, soci, checkpoints; "" while it is read whole
	Reason    string `json:"Reason"`             // why that
	Unproven  bool   `json:"Unproven,omitempty"` // not yet compared with its index, which others made
	Size      int64  `json:"Size"`
	Fetched   int64  `json:"Fetched"`
	Local     int64  `json:"Local"`
	Whole     bool   `json:"Whole"`
}

// UnmountOptions are what `varve umount` asks for.
type UnmountOptions struct {
	Mount string `json:"mount"` // a name, an id or the beginning of one, a directory
	Force bool   `json:"force,omitempty"`
	Lazy  bool   `json:"lazy,omitempty"`
	// Remove also deletes the changes of a writable mount.
	Remove bool `json:"remove,omitempty"`

	own bool // of the daemon itself
}

// Removed is what `varve rm` and `varve prune` deleted.
type Removed struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"` // that the upper had on disk
}

// PathOptions name a path in an image.
type PathOptions struct {
	ImageOptions
	Path      string `json:"path"`
	Recursive bool   `json:"recursive,omitempty"`
}

// ExportOptions name a mount, or else an image, and a path in it.
type ExportOptions struct {
	ImageOptions        // Image is the name of a mount, an id, a directory in one, or an image
	Path         string `json:"path,omitempty"` // "" is all of it
	Follow       bool   `json:"follow,omitempty"`
}

// Delta is a line of `varve diff`.
type Delta struct {
	Kind string `json:"Type"` // A, C or D, as docker says
	Path string `json:"Path"` // absolute
	Size int64  `json:"Size"` // bytes of a regular file that was added or changed
}

// CommitOptions are what `varve commit` asks for.
type CommitOptions struct {
	Mount            string     `json:"mount"`
	Ref              string     `json:"ref,omitempty"` // "" for an image without a name
	Author           string     `json:"author,omitempty"`
	Message          string     `json:"message,omitempty"`
	Changes          []string   `json:"changes,omitempty"`     // Dockerfile instructions
	NoPause          bool       `json:"no_pause,omitempty"`    // take what is there while it is being written
	Format           string     `json:"format,omitempty"`      // "" for the base's; oci, docker
	Compression      string     `json:"compression,omitempty"` // "" for estargz
	Squash           bool       `json:"squash,omitempty"`
	DryRun           bool       `json:"dry_run,omitempty"`
	Include          []string   `json:"include,omitempty"`
	Exclude          []string   `json:"exclude,omitempty"`
	Created          *time.Time `json:"created,omitempty"`           // nil for now
	RewriteTimestamp bool       `json:"rewrite_timestamp,omitempty"` // no file is younger than Created
	Push             bool       `json:"push,omitempty"`
	Insecure         bool       `json:"insecure,omitempty"` // where it is pushed to
	Auth             image.Auth `json:"auth"`
	AuthConfig       string     `json:"auth_config,omitempty"`
}

// Committed is what came of a commit.
type Committed struct {
	Digest  string  `json:"Digest,omitempty"` // the image ID; "" of a dry run
	Layer   string  `json:"Layer,omitempty"`  // digest of the new layer; "" if nothing changed
	Size    int64   `json:"Size"`             // of the new layer's blob
	Raw     int64   `json:"Raw"`              // of the layer's tar
	Entries int     `json:"Entries"`          // names in it
	Deltas  []Delta `json:"Deltas,omitempty"` // of a dry run
	Pushed  *Pushed `json:"Pushed,omitempty"`
}

// Pushed is what a push did with the blobs of an image.
type Pushed struct {
	Ref      string `json:"Ref"`
	Digest   string `json:"Digest"`
	Size     int64  `json:"Size"`     // of the manifest
	Uploaded Count  `json:"Uploaded"` // from this machine
	Mounted  Count  `json:"Mounted"`  // from another repository of the registry
	Existed  Count  `json:"Existed"`  // were there already
	Streamed Count  `json:"Streamed"` // from another registry, through this machine
}

// Count is a number of blobs and their bytes.
type Count struct {
	Blobs int   `json:"Blobs"`
	Bytes int64 `json:"Bytes"`
}

// PushOptions are what `varve push` asks for.
type PushOptions struct {
	ImageOptions
}

// SaveOptions are what `varve save` asks for.
type SaveOptions struct {
	Refs []string `json:"refs"`
	ImageOptions
}

// File is a name of an image, as `varve ls` shows it.
type File struct {
	Path    string    `json:"path"` // from the root, with a leading slash
	Mode    uint32    `json:"mode"`
	Nlink   uint32    `json:"nlink"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	Rdev    uint32    `json:"rdev,omitempty"`
	ModTime time.Time `json:"mtime"`
	Link    string    `json:"link,omitempty"`
	Dir     bool      `json:"dir,omitempty"` // begins the listing of a directory
}

// Version says what runs.
type Version struct {
	Version   string `json:"Version"`
	GoVersion string `json:"GoVersion"`
	Revision  string `json:"Revision"`
	PID       int    `json:"Pid,omitempty"`
	Root      string `json:"State,omitempty"`
}

// Status is a change of state of one of the things that something is done to, a
// layer mostly, in the keys of docker's streams.
type Status struct {
	ID      string `json:"id,omitempty"`
	Status  string `json:"status"` // in docker's words
	Current int64  `json:"current,omitempty"`
	Total   int64  `json:"total,omitempty"` // 0: no bar
}

// event is a line of an answer that takes its time: progress, then a result or
// an error.
type event struct {
	Progress  string     `json:"progress,omitempty"`
	Warning   string     `json:"warning,omitempty"`
	Status    *Status    `json:"status,omitempty"`
	Mount     *Mount     `json:"mount,omitempty"`
	Commit    *Committed `json:"commit,omitempty"`
	Push      *Pushed    `json:"push,omitempty"`
	Converted *Converted `json:"converted,omitempty"`
	Saved     bool       `json:"saved,omitempty"`
	Indexed   *Indexed   `json:"indexed,omitempty"`
	Pulled    *Pulled    `json:"pulled,omitempty"`
	Warmed    *Warmed    `json:"warmed,omitempty"`
	Error     *Error     `json:"error,omitempty"`

	Profile *ProfileInfo `json:"profile,omitempty"`
}
