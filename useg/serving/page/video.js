// Camera or video file -> frames. Frames that come faster than they are used are skipped.

/** Opens the camera. Returns {name, video, isCamera, close()}. */
export async function openCamera() {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers allow the camera only on HTTPS pages and on localhost.");
  }
  const stream = await navigator.mediaDevices
    .getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } })
    .catch((error) => {
      const isBlocked = error.name === "NotAllowedError";
      throw new Error(
        isBlocked
          ? "The browser blocks the camera. Allow it for this page and try again."
          : "No camera was found, or another program is using it.",
      );
    });
  const video = createVideo();
  video.srcObject = stream;
  const close = () => {
    video.pause();
    for (const track of stream.getTracks()) track.stop();
  };
  return { name: "camera", video, isCamera: true, close };
}

/** Opens a video file. Returns the same. */
export async function openVideo(file) {
  const video = createVideo();
  const close = () => {
    video.pause();
    URL.revokeObjectURL(video.src);
  };
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () =>
      reject(
        new Error("This browser cannot play this video. Try MP4 or WebM, or run useg predict."),
      );
    video.src = URL.createObjectURL(file);
  }).catch((error) => {
    close();
    throw error;
  });
  return { name: file.name, video, isCamera: false, close };
}

function createVideo() {
  return Object.assign(document.createElement("video"), { muted: true, playsInline: true });
}

/**
 * Yields {frame, moving}: the newest frame while the video plays, and the same frame once more
 * with `moving` false when it pauses. `frame` is an ImageBitmap that the caller must close.
 */
export async function* frames(video, signal) {
  let numFrames = 0;
  const count = () => (numFrames = video.requestVideoFrameCallback(count));
  if (video.requestVideoFrameCallback) count();
  for (let last = ""; !signal.aborted; await new Promise(requestAnimationFrame)) {
    const now = `${numFrames || video.currentTime} ${video.paused}`;
    if (now === last || video.seeking) continue;
    // The first frame may not be decoded yet.
    const frame = await createImageBitmap(video).catch(() => null);
    if (!frame) continue;
    last = now;
    yield { frame, moving: !video.paused };
  }
}
