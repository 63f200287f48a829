// Pictures for a message: files from a button, the clipboard or a drop, as data: URIs that the API takes.

const KEPT = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_SIDE = 2048; // pixels; above what Llama 4 looks at (16 tiles of 336), so nothing it could see is lost
const MAX_BYTES = 4 << 20;

/** The files of a paste or a drop that are pictures. */
function pictures(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** Give `attach` the pictures that are pasted or dropped anywhere on the page. */
export function listen(attach) {
  document.addEventListener("paste", (event) => {
    const found = pictures(event.clipboardData);
    if (!found.length) return;
    event.preventDefault();
    attach(found);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser would leave the page for the file
    document.body.classList.remove("dropping");
    attach(pictures(event.dataTransfer));
  });
}

/** A file as it is, if the API takes it and it is small; else drawn anew. Throws an Error in plain words. */
export async function dataUri(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} cannot be read as a picture.`);
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && KEPT.includes(file.type) && file.size <= MAX_BYTES) return read(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return file.type === "image/jpeg" ? canvas.toDataURL("image/jpeg", 0.92) : canvas.toDataURL("image/png");
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
