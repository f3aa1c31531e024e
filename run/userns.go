package run

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	osuser "os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/moby/sys/user"
	"github.com/moby/sys/userns"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// privilege is what the process that makes a bundle may.
type privilege struct {
	plain  bool // not root: the container gets a user namespace of its own
	nested bool // root of a user namespace, which the container stays in
	// Who there is in the container: all, unless confined.
	uids, gids []specs.LinuxIDMapping
}

// confined says that devices cannot be made, nor control groups or sysfs be had.
func (p *privilege) confined() bool { return p.plain || p.nested }

// alone says that files cannot be given to anybody else.
func (p *privilege) alone() bool {
	return p.plain || p.nested && (count(p.uids) == 1 || count(p.gids) == 1)
}

func readPrivilege() (*privilege, error) {
	p := &privilege{plain: os.Geteuid() != 0}
	if p.nested = !p.plain && userns.RunningInUserNS(); p.nested {
		return p, p.readMaps()
	} else if !p.plain {
		return p, nil
	}
	if raw, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err == nil && string(raw) == "0\n" {
		return nil, errors.New("a container of a plain user needs user namespaces, which this machine forbids (sysctl user.max_user_namespaces): run it as root")
	}
	who := []string{strconv.Itoa(os.Geteuid())}
	if u, err := osuser.Current(); err == nil {
		who = append(who, u.Username)
	}
	p.uids = mapping(os.Geteuid(), "/etc/subuid", "newuidmap", who)
	p.gids = mapping(os.Getegid(), "/etc/subgid", "newgidmap", who)
	if len(p.uids) == 1 || len(p.gids) == 1 {
		// One alone has nobody to belong to.
		p.uids, p.gids = p.uids[:1], p.gids[:1]
	}
	return p, nil
}

// mapping has the caller as root, and the identities that the caller was lent
// (subuid(5)) from 1 on where the program that may set them is here.
func mapping(id int, file, helper string, who []string) []specs.LinuxIDMapping {
	out := []specs.LinuxIDMapping{{ContainerID: 0, HostID: uint32(id), Size: 1}}
	if _, err := exec.LookPath(helper); err != nil {
		return out
	}
	ranges, err := user.ParseSubIDFileFilter(file, func(s user.SubID) bool { return slices.Contains(who, s.Name) })
	if err != nil {
		return out
	}
	next := int64(1)
	for _, r := range ranges {
		if r.Count <= 0 || r.SubID <= 0 || r.SubID+r.Count > 1<<32-1 || next+r.Count > 1<<32-1 {
			continue
		}
		out = append(out, specs.LinuxIDMapping{ContainerID: uint32(next), HostID: uint32(r.SubID), Size: uint32(r.Count)})
		next += r.Count
	}
	return out
}

// readMaps reads who there is in this user namespace.
func (p *privilege) readMaps() error {
	for file, maps := range map[string]*[]specs.LinuxIDMapping{"/proc/self/uid_map": &p.uids, "/proc/self/gid_map": &p.gids} {
		all, err := user.ParseIDMapFile(file)
		if err != nil {
			return err
		}
		for _, m := range all {
			*maps = append(*maps, specs.LinuxIDMapping{ContainerID: uint32(m.ID), HostID: uint32(m.ParentID), Size: uint32(m.Count)})
		}
	}
	return nil
}

// has says whether an identity exists in the container.
func (p *privilege) has(maps []specs.LinuxIDMapping, id uint32) bool {
	for _, m := range maps {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return true
		}
	}
	return !p.confined()
}

// check refuses who does not exist in the container, or may not enter its root.
// Who is started by a plain user has no further groups: runc refuses them, and
// where somebody wrote one's own gid_map the kernel does (user_namespaces(7)).
func (p *privilege) check(root string, u *specs.User) error {
	if !p.confined() {
		return nil
	}
	if !p.has(p.uids, u.UID) || !p.has(p.gids, u.GID) {
		return fmt.Errorf("user %d:%d does not exist in the container of a plain user, which has %d users and %d groups here: run it as root, with -u 0, or lend more in /etc/subuid and /etc/subgid and install newuidmap (apt-get install uidmap)", u.UID, u.GID, count(p.uids), count(p.gids))
	}
	if p.nested {
		raw, err := os.ReadFile("/proc/self/setgroups")
		if err == nil && strings.TrimSpace(string(raw)) == "deny" {
			u.AdditionalGids = nil
		}
		u.AdditionalGids = slices.DeleteFunc(u.AdditionalGids, func(g uint32) bool { return !p.has(p.gids, g) })
		return err
	}
	u.AdditionalGids = nil
	if u.UID == 0 && u.GID == 0 {
		return nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(root))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		// Whose identities are not those of who mounted it is not let in
		// (fuse_allow_current_process, fs/fuse/dir.c).
		if strings.HasPrefix(m.FSType, "fuse") && !strings.Contains(m.VFSOptions, "allow_other") {
			return fmt.Errorf("user %d:%d of the container could not read its files: a plain user's mount is open to that user alone, who is root in the container: run it with -u 0, or as root", u.UID, u.GID)
		}
	}
	return nil
}

func count(maps []specs.LinuxIDMapping) (n uint64) {
	for _, m := range maps {
		n += uint64(m.Size)
	}
	return n
}
