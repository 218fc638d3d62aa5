// Camera or video file -> frames, each the newest that there is once the one before has been dealt with.

/** Opens the camera: {name, video, isCamera, close()}. */
export async function openCamera() {
  if (!navigator.mediaDevices) throw new Error("A browser gives its camera to this page only over https or on this machine itself.");
  const stream = await navigator.mediaDevices
    .getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } })
    .catch((error) => {
      throw new Error(error.name === "NotAllowedError" ? "The camera was not allowed." : "No camera was found.");
    });
  const video = silent();
  video.srcObject = stream;
  const close = () => {
    video.pause();
    for (const track of stream.getTracks()) track.stop();
  };
  return { name: "camera", video, isCamera: true, close };
}

/** Opens a video file: the same. */
export async function openFilm(file) {
  const video = silent();
  const close = () => {
    video.pause();
    URL.revokeObjectURL(video.src);
  };
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Error("This browser cannot play this video; useg predict labels it, or try MP4 or WebM."));
    video.src = URL.createObjectURL(file);
  }).catch((error) => {
    close();
    throw error;
  });
  return { name: file.name, video, isCamera: false, close };
}

function silent() {
  return Object.assign(document.createElement("video"), { muted: true, playsInline: true });
}

/**
 * Yields {frame, moving}: while the video plays its newest frame, and each time it stands still that frame once more, `moving` no longer. A frame
 * is an ImageBitmap and the taker's to close.
 */
export async function* frames(video, signal) {
  let news = 0;
  const count = () => (news = video.requestVideoFrameCallback(count));
  if (video.requestVideoFrameCallback) count();
  for (let seen = ""; !signal.aborted; await new Promise(requestAnimationFrame)) {
    const now = `${news || video.currentTime} ${video.paused}`;
    if (now === seen || video.seeking) continue;
    const frame = await createImageBitmap(video).catch(() => null); // none is there yet
    if (!frame) continue;
    seen = now;
    yield { frame, moving: !video.paused };
  }
}
